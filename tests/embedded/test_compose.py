"""The compose file, the configuration of three servers and the code speak of the same things. No container is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import aiohttp
import anyio
import pytest
import yaml

from kvplane.events.log.connection import connected
from kvplane.services.auth.folder import AuthFolder
from kvplane.services.cli import app
from kvplane.services.embedded.server import configuration, server_binary
from tests.support.ports import free_port
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose"
pytestmark = pytest.mark.anyio

TEXT = (COMPOSE / "compose.yaml").read_text()
CLUSTER = (COMPOSE / "nats" / "cluster.conf").read_text()


def services() -> dict[str, str]:
    """Text of each service by its name."""
    body = re.search(r"^services:\n(.*?)^volumes:", TEXT, re.MULTILINE | re.DOTALL)
    assert body is not None
    parts = re.split(r"^  ([a-z0-9-]+):", body.group(1), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_no_container_has_more_rights_than_it_needs() -> None:
    for name, service in yaml.safe_load(TEXT)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"], name
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${KVPLANE_BIND:-127.0.0.1}:")), name
        assert service["image"].endswith("}"), name
        assert not any(str(value).lower() == "admin" for value in service.get("environment", {}).values()), name


def test_images_are_named_by_what_they_hold() -> None:
    """A tag is another image tomorrow."""
    texts = [TEXT, (COMPOSE / "Dockerfile").read_text()]
    named = [found for text in texts for found in re.findall(r"(?:_IMAGE:-|BASE:-|ARG BASE=)([^}\s]+)", text)]
    others = [name for name in named if name != "kvplane"]
    assert len(others) == 4
    for name in others:
        assert re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", name), name
    assert len(set(others)) == 3, "the image is built on one base, wherever it is named"


async def test_a_single_server_is_there_for_this_machine_alone(tmp_path: Path) -> None:
    port = free_port()
    text = (COMPOSE / "nats" / "single.conf").read_text().replace("port: 4222", f"port: {port}")
    (tmp_path / "single.conf").write_text(text)
    process = await anyio.open_process(
        [server_binary(), "-c", "single.conf"], cwd=tmp_path, stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        async with connected([f"nats://127.0.0.1:{port}"], "test", connect_seconds=20):
            # The whole of 127/8 is this machine's: who listens everywhere answers there, too.
            with pytest.raises(OSError, match="111|refused|failed"):
                await anyio.connect_tcp("127.0.0.2", port)
    finally:
        process.terminate()
        await process.aclose()


def test_every_setting_of_the_servers_is_given_and_no_other() -> None:
    wanted = set(re.findall(r"\$(NATS_[A-Z_]+)", CLUSTER))
    given = set(re.findall(r"(NATS_[A-Z_]+):", TEXT))
    assert wanted == given
    assert wanted == set(re.findall(r"^#   (NATS_[A-Z_]+) ", CLUSTER, re.MULTILINE))


def test_servers_are_called_the_same_everywhere() -> None:
    names = [name for name in services() if name.startswith("nats-")]
    assert len(names) == 3
    routes = re.search(r'NATS_ROUTES: "\[(.*)\]"', TEXT)
    urls = re.search(r"KVPLANE_SERVER: (.*)", TEXT)
    assert routes is not None
    assert urls is not None
    assert routes.group(1).split(", ") == [f"nats://{name}:6222" for name in names]
    assert urls.group(1).split() == [f"nats://{name}:4222" for name in names]
    for name in names:
        own = services()[name]
        assert f"NATS_NAME: {name}," in own
        assert f'NATS_ADVERTISE: "{name}:4222"' in own
        assert f'"./auth/servers/{name}:/etc/nats/auth:ro", "{name}:/data"' in own


def test_what_is_mounted_or_copied_is_there() -> None:
    mounted = re.findall(r"(\./[a-z.][\w./-]*):/", TEXT)
    made_later = ("./auth/", "./grafana/dashboards")
    assert mounted
    for path in mounted:
        assert path.startswith(made_later) or (COMPOSE / path).exists(), path
    copied = re.findall(r"^COPY (?!--from)(.*)", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)
    kept = (ROOT / ".dockerignore").read_text().split()
    for path in [path for line in copied for path in line.split()[:-1]]:
        assert (ROOT / path).exists(), path
        assert any(path == each[1:] or path.startswith(f"{each[1:]}/") for each in kept if each[0] == "!"), path


def test_every_command_and_every_variable_is_one_of_kvplane() -> None:
    commands = re.findall(r"command: \[([a-z]+)", TEXT)
    assert set(commands) == {"coordinator", "router", "historian"}
    known = {
        variable
        for command in commands
        for argument in app[command].assemble_argument_collection()
        for variable in argument.parameter.env_var or ()
    }
    for name in re.findall(r"^  (KVPLANE_[A-Z_]+):", TEXT, re.MULTILINE):
        assert name in known, name


def test_prometheus_asks_every_service_at_the_port_where_it_answers() -> None:
    targets = set(re.findall(r'"([a-z0-9-]+:\d+)"', (COMPOSE / "prometheus.yml").read_text()))
    answering = [name for name in services() if name.startswith(("router", "coordinator", "historian"))]
    port = re.search(r"KVPLANE_HTTP: 0\.0\.0\.0:(\d+)", TEXT)
    assert port is not None
    assert targets == {f"{name}:{port.group(1)}" for name in answering}


def test_all_servers_keep_what_they_acknowledge_and_take_what_is_written() -> None:
    """The same limits, wherever a server comes from."""
    alone = (COMPOSE / "nats" / "single.conf").read_text()
    embedded = configuration(Path("data"), name="n", host="h", port=1)
    for setting in ("max_payload: 8388608", "max_pending: 268435456", "sync_interval: always"):
        for text in (CLUSTER, alone, embedded):
            assert setting in text, setting


async def test_the_monitoring_port_answers_those_alone_who_know_its_path(tmp_path: Path) -> None:
    """It shows whose inboxes there are; the configuration that is deployed includes the same file."""
    assert 'http: $NATS_MONITOR\ninclude "auth/monitor.conf"' in CLUSTER
    assert "auth/monitor.conf" in TEXT.replace("/etc/nats/", "")
    held = AuthFolder(tmp_path / "auth")
    held.set_servers(["n1"])
    held.save()
    secret = held.server_folder("n1") / "monitor.conf"
    port, monitor = free_port(), free_port()
    text = f'port: {port}\nhttp: "127.0.0.1:{monitor}"\ninclude "auth/servers/n1/monitor.conf"\n'
    (tmp_path / "nats.conf").write_text(text)
    healthy = [sys.executable, str(COMPOSE / "healthy"), f"http://127.0.0.1:{monitor}/healthz"]
    async with await anyio.open_process([server_binary(), "-c", str(tmp_path / "nats.conf")], stderr=DEVNULL) as server:
        await until(lambda: subprocess.run([*healthy, str(secret)], capture_output=True, check=False).returncode == 0)
        async with aiohttp.ClientSession() as session:
            for page in ("", "connz?subs=1", "jsz", "varz", "healthz", "subsz", "stacksz"):
                async with session.get(f"http://127.0.0.1:{monitor}/{page}") as answer:
                    assert answer.status == 404, page
        server.terminate()


def test_nothing_that_kvplane_starts_has_a_monitoring_port_that_was_not_asked_for() -> None:
    alone = (COMPOSE / "nats" / "single.conf").read_text()
    for text in (alone, configuration(Path("data"), name="n", host="h", port=1)):
        assert not re.search(r"^\s*(http|https|http_port|https_port|monitor_port)\s*[:=]", text, re.MULTILINE)


@pytest.mark.parametrize("missing", ["", "NATS_NAME", "NATS_ROUTES"])
def test_the_configuration_is_valid_when_all_is_given(tmp_path: Path, missing: str) -> None:
    shutil.copy(COMPOSE / "nats" / "cluster.conf", tmp_path)
    (tmp_path / "auth").mkdir()
    for name in ("client.conf", "cluster.conf", "monitor.conf"):
        (tmp_path / "auth" / name).touch()
    environment: dict[str, str] = dict.fromkeys(re.findall(r"\$(NATS_[A-Z_]+)", CLUSTER), "x")
    environment |= {
        "NATS_PORT": "4222",
        "NATS_CLUSTER_PORT": "6222",
        "NATS_ROUTES": "[nats://x:6222]",
        "NATS_MONITOR": "0",
    }
    environment.pop(missing, None)
    done: Any = subprocess.run(
        [server_binary(), "-t", "-c", str(tmp_path / "cluster.conf")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is not bool(missing), done.stderr
    assert missing in done.stderr


def test_the_lock_of_the_image_is_part_of_the_lock_of_the_project() -> None:
    def entries(path: Path) -> dict[str, set[str]]:
        parts = re.split(r"^([a-z0-9-]+==\S+)", path.read_text(), flags=re.MULTILINE)[1:]
        return {name: set(re.findall(r"sha256:\w+", rest)) for name, rest in zip(parts[::2], parts[1::2], strict=True)}

    image, project = entries(COMPOSE / "requirements.lock"), entries(ROOT / "requirements.lock")
    assert image
    assert {name: hashes for name, hashes in image.items() if project.get(name) != hashes} == {}


def test_an_upgrade_waits_until_a_service_is_ready_at_the_port_where_it_answers() -> None:
    """Alive is too early: a replica that still reads the log answers nobody."""
    port = re.search(r"KVPLANE_HTTP: 0\.0\.0\.0:(\d+)", TEXT)
    assert port is not None
    asked = re.search(r"^x-service:.*?healthy, \"(.*?)\"", TEXT, re.MULTILINE | re.DOTALL)
    assert asked is not None
    assert asked.group(1) == f"http://127.0.0.1:{port.group(1)}/readyz"
