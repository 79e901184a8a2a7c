"""The folder of credentials, and real servers that read it: made, added to, taken back, renewed."""

from __future__ import annotations

import os
import signal
import socket
import stat
from datetime import UTC, datetime, timedelta
from ssl import SSLError
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import pytest

from kvplane.events.errors import BadCredentials, KvplaneError, LoginRefused, UntrustedServer
from kvplane.events.log.connection import connected
from kvplane.events.log.credentials import read_seed, trust
from kvplane.events.log.follow import single
from kvplane.services.auth import certificates
from kvplane.services.auth.folder import AuthFolder
from kvplane.services.cli import main
from kvplane.services.embedded.server import Server, server_binary, start_server
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask
from tests.support.commands import asked, run, up
from tests.support.ports import free_port
from tests.support.waiting import until
from tests.support.with_credentials import NAME, Guarded, folder_of, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as running:
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def reloaded(server: Server) -> None:
    before = server.log.read_text().count("Reloaded server configuration")
    os.kill(server.pid, signal.SIGHUP)
    await until(lambda: server.log.read_text().count("Reloaded server configuration") > before)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Commands:
    """`kvplane` in this process: starting one takes seconds where others work."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, **environment: str) -> Done:
        for name, value in environment.items():
            self._monkeypatch.setenv(name, value)
        code = 0
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *self._capsys.readouterr())


@pytest.fixture
def kvplane(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(capsys, monkeypatch)


def test_init_makes_what_is_missing_and_keeps_what_is_there(tmp_path: Path, kvplane: Commands) -> None:
    folder = tmp_path / "deep" / "auth"
    first = kvplane("auth", "init", str(folder))
    assert first.returncode == 0, first.stderr
    assert "kvplane up --auth" in first.stderr
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    before = contents(folder)
    # Those that connect have URLs in the environment; they are not names of servers.
    assert kvplane("auth", "init", str(folder), KVPLANE_SERVER="nats://127.0.0.1:4222").returncode == 0
    assert contents(folder) == before
    (folder / "servers" / "server" / "server.key").unlink()
    (folder / "seeds" / "default" / "client.seed").unlink()
    assert "made the certificate of server" in kvplane("auth", "init", str(folder)).stderr
    assert contents(folder).keys() == before.keys() - {"seeds/default/client.seed"}
    assert kvplane("auth", "init", str(folder), "--fleet", "other").returncode == 0
    assert {name for name in contents(folder) if name.startswith("seeds/other/")} == {
        f"seeds/other/{role}.seed" for role in ("admin", "coordinator", "router", "historian", "client")
    }


def test_a_seed_is_made_once_and_again_only_when_told(tmp_path: Path, kvplane: Commands) -> None:
    where = ["--auth", str(tmp_path)]
    assert kvplane("auth", "init", str(tmp_path)).returncode == 0
    assert kvplane("auth", "add", "node", "Qwen/node a*", *where).returncode == 0
    (seed,) = (tmp_path / "seeds" / "default").glob("node-*")
    made = seed.read_text()
    again = kvplane("auth", "add", "node", "Qwen/node a*", *where)
    assert again.returncode == 1
    assert "--replace makes a new one" in again.stderr
    assert seed.read_text() == made
    assert kvplane("auth", "add", "node", "Qwen/node a*", *where, "--replace").returncode == 0
    assert seed.read_text() != made
    listed = kvplane("auth", "list", *where)
    assert "node/Qwen/node a*" in listed.stdout
    assert kvplane("auth", "remove", "node", "Qwen/node a*", *where).returncode == 0
    assert not seed.exists()
    assert "node/" not in kvplane("auth", "list", *where).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "node"], "a node's credentials are bound to its name"),
        (["add", "root"], "is not one of admin, coordinator"),
        (["add", "node", "x\n"], "can't be printed"),
        (["remove", "client", "nobody"], "there is no client/nobody"),
        (["add", "client", "--fleet", "no.such"], "fleet name 'no.such' must be"),
        (["list", "--auth", "none"], "make them with `kvplane auth init none`"),
    ],
)
def test_nonsense_is_answered_with_a_sentence(
    tmp_path: Path, kvplane: Commands, arguments: list[str], says: str
) -> None:
    AuthFolder(tmp_path).save()
    done = kvplane("auth", *arguments, KVPLANE_AUTH=str(tmp_path))
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_server_learns_of_new_users_and_of_those_that_are_none_any_more(fleet: Guarded) -> None:
    assert fleet.held.add(NAME, "node", "late")
    fleet.held.save()
    with pytest.raises(LoginRefused, match="does not know the credentials U"):
        await fleet.connect("node", "late")
    await reloaded(fleet.server)
    late = await fleet.connect("node", "late")
    kept = await fleet.connect("node", "node-b")

    fleet.held.remove(NAME, "node", "late")
    fleet.held.save()
    await reloaded(fleet.server)
    await until(lambda: late.is_closed)
    assert kept.is_connected


async def test_a_service_whose_credentials_are_taken_back_ends_and_says_so(fleet: Guarded) -> None:
    await fleet.coordinator()
    router = Router(await fleet.connect("router"), NAME)
    ended: list[BaseException] = []

    async def serve() -> None:
        try:
            await router.run()
        except BaseExceptionGroup as errors:
            ended.append(single(errors))

    fleet.group.start_soon(serve)
    await until(lambda: router.replica.ready)
    fleet.held.remove(NAME, "router")
    fleet.held.save()
    await reloaded(fleet.server)
    await until(lambda: ended)
    assert isinstance(ended[0], LoginRefused)


async def test_who_is_refused_after_a_restart_knocks_for_a_while_only(tmp_path: Path) -> None:
    held = folder_of(tmp_path / "auth")
    port = free_port()
    server = await start_server(tmp_path / "data", port=port, include=held.place_alone())
    seed = held.seed_file(NAME, "client")
    async with connected([server.url], "x", credentials=seed, ca=held.ca, refused_seconds=1) as client:
        await server.stop()
        held.remove(NAME, "client")
        held.save()
        server = await start_server(tmp_path / "data", port=port, include=held.place_alone())
        await until(lambda: client.is_closed)
        assert "does not know" in client.refused  # type: ignore[attr-defined]
    await server.stop()


async def test_certificates_are_believed_only_from_the_own_ca_for_the_right_name(
    fleet: Guarded, tmp_path: Path
) -> None:
    stranger = folder_of(tmp_path / "stranger")
    seed = fleet.held.seed_file(NAME, "client")
    cases: list[tuple[str, Path | None, Path | None, type[KvplaneError], str]] = [
        (fleet.url, seed, stranger.ca, UntrustedServer, "is not trusted"),
        (fleet.url, seed, None, UntrustedServer, "give the fleet's CA with --ca"),
        (fleet.url, None, fleet.held.ca, LoginRefused, "give a seed file with --credentials"),
        (fleet.url, stranger.seed_file(NAME, "admin"), fleet.held.ca, LoginRefused, "does not know"),
    ]
    for url, credentials, ca, kind, says in cases:
        with pytest.raises(kind, match=says):
            async with connected([url], "x", connect_seconds=2, credentials=credentials, ca=ca):
                pass
    plain = await start_server(tmp_path / "plain", port=free_port())
    with pytest.raises(UntrustedServer, match="offers no TLS"):
        async with connected([plain.url], "x", credentials=seed, ca=fleet.held.ca):
            pass
    await plain.stop()


async def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    held = folder_of(tmp_path / "auth")
    pair = certificates.Pair(held.ca.read_bytes(), (held.path / "ca.key").read_bytes())
    made = certificates.new_server(pair, "elsewhere", ["elsewhere.example"])
    place = held.server_folder("server")
    include = held.place_alone()
    (place / "server.pem").write_bytes(made.certificate)
    (place / "server.key").write_bytes(made.key)
    server = await start_server(tmp_path / "data", port=free_port(), include=include)
    with pytest.raises(UntrustedServer, match="is for another name .*--also NAME --renew"):
        async with connected([server.url], "x", credentials=held.seed_file(NAME, "client"), ca=held.ca):
            pass
    held.set_servers([])
    assert held.save() == ["server"]
    held.place_alone()
    await reloaded(server)
    async with connected([server.url], "x", credentials=held.seed_file(NAME, "client"), ca=held.ca) as client:
        assert client.is_connected
    await server.stop()


def test_a_seed_that_others_can_read_is_warned_of_and_one_that_is_none_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = folder_of(tmp_path)
    seed = held.seed_file(NAME, "client")
    seed.chmod(0o644)
    logs.configure("warning", "json")
    read_seed(seed)
    assert "chmod 600" in capfd.readouterr().err
    for path in (held.ca, tmp_path, tmp_path / "none"):
        with pytest.raises(BadCredentials, match=str(path)):
            read_seed(path)
    for path in (seed, tmp_path / "none"):
        with pytest.raises(BadCredentials, match=str(path)):
            trust(path)


def test_certificates_can_be_renewed_and_their_end_is_told(tmp_path: Path, kvplane: Commands) -> None:
    held = folder_of(tmp_path)
    before = (held.server_folder("server") / "server.pem").read_bytes()
    assert timedelta(days=800) < held.ends()["server"] - datetime.now(UTC) < timedelta(days=826)
    done = kvplane("auth", "init", str(tmp_path), "--renew", "--also", "nats.example")
    assert done.returncode == 0
    after = (held.server_folder("server") / "server.pem").read_bytes()
    assert after != before
    assert "nats.example" in certificates.names_of(after)
    assert certificates.signed_by(after, held.ca.read_bytes())


def test_up_with_credentials_serves_those_that_have_some(tmp_path: Path) -> None:
    """By command, in processes of their own, as in docs/security.md."""
    folder = tmp_path / "auth"
    assert run("auth", "init", str(folder)).returncode == 0
    with up(tmp_path / "data", "--auth", str(folder), "--simulate", "2") as (url, _):
        seeds = folder / "seeds" / "default"
        ca = ["--ca", str(folder / "ca.pem")]
        answer = asked(
            url, "route", "sim", "--prompt", "hello", "--record", *ca, "--credentials", str(seeds / "client.seed")
        )
        assert answer["node"].startswith("sim-")
        nodes = asked(url, "node", "list", *ca, "--credentials", str(seeds / "admin.seed"))["nodes"]
        assert [row["state"] for row in nodes] == ["up", "up"]
        refused = run("node", "cordon", "sim-1", *ca, "--credentials", str(seeds / "client.seed"), KVPLANE_SERVER=url)
        assert refused.returncode == 1
        assert refused.stderr.splitlines() == [
            "kvplane: these credentials may not ask kv.default.coordinator.node.cordon; use those of another role [not_allowed]"
        ]
        data = [tmp_path / "data", *(tmp_path / "data").rglob("*")]
        # What others could read: requests, addresses, hashes of prompts.
        assert [path for path in data if path.exists() and path.stat().st_mode & 0o077 and not path.is_symlink()] == []
        nobody = run("node", "list", *ca, KVPLANE_SERVER=url)
        assert "give a seed file with --credentials" in nobody.stderr
        assert len(nobody.stderr.splitlines()) == 1


async def test_three_servers_let_each_other_in_by_their_certificates_and_nobody_else(tmp_path: Path) -> None:
    names = ["n1", "n2", "n3"]
    held = AuthFolder(tmp_path / "auth")
    held.set_servers(names, seen="auth")
    held.add(NAME, "coordinator")
    held.add(NAME, "admin")
    held.save()
    ports = {name: (free_port(), free_port()) for name in names}
    routes = ", ".join(f'"nats://127.0.0.1:{route}"' for _, route in ports.values())
    processes, urls = [], []
    for name in names:
        # Where the files lie for this server: beside its configuration, in its working directory.
        here = tmp_path / name
        here.mkdir()
        held.server_folder(name).rename(here / "auth")
        port, route = ports[name]
        (here / "nats.conf").write_text(f"""
            server_name: {name}
            listen: "127.0.0.1:{port}"
            include "auth/client.conf"
            jetstream {{ store_dir: "data", sync_interval: always }}
            cluster {{ name: c, listen: "127.0.0.1:{route}", routes: [{routes}]
              include "auth/cluster.conf"
            }}
        """)
        with (here / "log").open("wb") as log:
            processes.append(
                await anyio.open_process([server_binary(), "-c", "nats.conf"], cwd=here, stdout=log, stderr=log)
            )
        urls.append(f"nats://127.0.0.1:{port}")
    try:
        async with connected(
            urls, "c", credentials=held.seed_file(NAME, "coordinator"), ca=held.ca, connect_seconds=20
        ) as client:
            with anyio.fail_after(60):
                while True:
                    try:
                        async with anyio.create_task_group() as group:
                            await group.start(Coordinator(client, NAME, replicas=3).run)
                            async with connected(
                                urls, "a", credentials=held.seed_file(NAME, "admin"), ca=held.ca
                            ) as admin:
                                status: dict[str, Any] = await ask(
                                    admin, f"kv.{NAME}.coordinator.status", messages.StatusRequest()
                                )
                                info = await admin.jetstream().stream_info(f"KV_{NAME}")
                            group.cancel_scope.cancel()
                        break
                    except* KvplaneError:
                        await anyio.sleep(0.5)
        assert status["ready"]
        assert info.config.num_replicas == 3
        bare = socket.create_connection(("127.0.0.1", ports["n1"][1]), timeout=5)
        with (
            pytest.raises((SSLError, ConnectionError)),
            trust(held.ca).wrap_socket(bare, server_hostname="n1") as guest,
        ):
            guest.sendall(b"PING\r\n")
            while guest.recv(4096):
                pass
            raise ConnectionResetError
        await until(lambda: "TLS route handshake error" in (tmp_path / "n1" / "log").read_text())
    finally:
        for process in processes:
            process.kill()
            await process.wait()
