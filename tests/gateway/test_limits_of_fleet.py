"""A tenant's limits over three gateways, one of them a process that is killed, and TLS towards clients and engines."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest
from anyio.streams.tls import TLSListener

from kvplane.events.errors import BadCredentials
from kvplane.projections import tenants
from kvplane.services.auth.certificates import new_ca, new_server
from kvplane.services.gateway import guard
from kvplane.services.gateway.guard import Guarded
from kvplane.services.protocol.messages import RegisterRequest
from tests.support.commands import started
from tests.support.gateways import PROMPT, answers, gateway_on, recorded
from tests.support.keys import bearer, make_key
from tests.support.ports import free_port
from tests.support.scripted_engine import EVENTS, MODEL, ScriptedEngine, chunk, engines
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet

GATEWAYS = 3


async def test_limits_hold_over_all_gateways_also_when_one_is_killed(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(guard, "ALIVE_SECONDS", 0.5)
    file = tmp_path / "keys"
    many, few = make_key(file, "many", requests_per_minute=20), make_key(file, "few", concurrent=4)
    at = f"127.0.0.1:{free_port()}"

    async def either(stream: SocketStream) -> None:
        if b'"stream":true' not in engine.requests[-1]:
            await answers(stream)
            return
        await stream.send(EVENTS + chunk(b'data: {"choices": []}\n\n'))
        await anyio.sleep_forever()

    engine = ScriptedEngine("e", either)
    await fleet.coordinator()
    command = started("gateway", "--listen", at, "--keys", str(file), "--server", fleet.url)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:  # noqa: ASYNC220 - starting it does not wait
        async with engines(fleet, engine), anyio.create_task_group() as group, AsyncExitStack() as stack:
            stack.callback(process.kill)
            scenes = [
                await stack.enter_async_context(gateway_on(fleet, group, guarded=Guarded(keys=file))) for _ in range(2)
            ]
            other = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://{at}", timeout=30))
            every = [other, *(scene.http for scene in scenes)]

            async def status(http: httpx.AsyncClient, secret: str) -> int:
                with suppress(httpx.ConnectError):
                    return (await http.post("/v1/completions", json=PROMPT, headers=bearer(secret))).status_code
                return 0

            # A key that comes while it runs is known after SIGHUP, and not before.
            await until(lambda: answers_with(status(other, "nobody"), 401), 30, every=0.1)
            late = make_key(file, "late")
            assert await status(other, late) == 401
            process.send_signal(signal.SIGHUP)
            await until(lambda: answers_with(status(other, late), 200), 10, every=0.05)

            # One after the other, at another gateway each: of what is on its way to the log there is one.
            found = [await status(every[turn % GATEWAYS], many) for turn in range(60)]
            assert set(found) == {200, 429}
            assert 20 <= found.count(200) <= 20 + (GATEWAYS - 1)
            assert found[-GATEWAYS:] == [429] * GATEWAYS

            async def stream(http: httpx.AsyncClient, scope: anyio.CancelScope) -> None:
                body = b'{"model":"%b","prompt":[1,2,3],"stream":true}' % MODEL.encode()
                with scope, suppress(httpx.TransportError):
                    await http.post("/v1/completions", content=body, headers=bearer(few))

            async def is_full(http: httpx.AsyncClient) -> bool:
                return await status(http, few) == 429

            before = len(engine.requests)
            scopes = [anyio.CancelScope() for _ in range(6)]
            for turn, http in enumerate([other, other, every[1], every[2]]):
                group.start_soon(stream, http, scopes[turn])
                await until(lambda turn=turn: len(engine.requests) == before + turn + 1)  # type: ignore[misc]
            for http in every:
                await until(lambda http=http: is_full(http))  # type: ignore[misc]
            os.kill(process.pid, signal.SIGKILL)
            # Two places come back, no more: those that live are asked, and their requests count on.
            for turn in (1, 2):
                await until(lambda turn=turn: answers_with(status(every[turn], few), 200), 15, every=0.1)  # type: ignore[misc]
            for turn in (1, 2):
                before = len(engine.requests)
                group.start_soon(stream, every[turn], scopes[3 + turn])
                await until(lambda before=before: len(engine.requests) == before + 1)  # type: ignore[misc]
            for http in every[1:]:
                await until(lambda http=http: is_full(http))  # type: ignore[misc]
            assert [await status(http, few) for http in every[1:]] == [429, 429]
            for scope in scopes:
                scope.cancel()
            for scene in scenes:
                await scene.idle()
            routed, _ = await recorded(fleet)
            assert {event.tenant for event in routed} == {"many", "late", "few"}
            group.cancel_scope.cancel()


async def answers_with(asked: object, status: int) -> bool:
    return await asked == status  # type: ignore[misc, no-any-return]


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A CA, and a server's certificate and key signed by it."""
    authority = new_ca("test")
    server = new_server(authority, "server", ["127.0.0.1", "localhost"])
    files = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    for path, data in zip(files, (authority.certificate, server.certificate, server.key), strict=True):
        path.write_bytes(data)
    return files


async def test_tls_towards_clients_and_engines(fleet: Fleet, tmp_path: Path) -> None:
    ca, cert, key = certificates(tmp_path)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(cert, key)
    engine = ScriptedEngine("e", answers)
    await fleet.coordinator()
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = plain.extra(anyio.abc.SocketAttribute.local_port)
        listener = await stack.enter_async_context(TLSListener(plain, served, standard_compatible=False))
        group.start_soon(partial(listener.serve, engine.serve))  # type: ignore[arg-type]
        node = RegisterRequest(
            node="e", address=f"https://127.0.0.1:{port}", models=[MODEL], block_size=4, capacity_blocks={"gpu": 1000}
        )
        await fleet.ask("coordinator.node.register", node)
        guarded = Guarded(engine_ca=ca, tls_cert=cert, tls_key=key, engine_key="secret")
        async with gateway_on(fleet, group, ca=ca, guarded=guarded) as scene:
            answer = await scene.http.post("/v1/completions", json=PROMPT)
            assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "hello")
            assert b"authorization: Bearer secret\r\n" in engine.requests[0]
            with pytest.raises(httpx.TransportError):
                await httpx.AsyncClient().get(scene.url + "/health")
            # A certificate that is renewed is served from SIGHUP on; one that can't be used is not.
            before = cert.read_bytes()
            cert.write_bytes(b"no certificate")
            scene.gateway.guard.reload()
            assert await shown(scene.gateway.address) == ssl.PEM_cert_to_DER_cert(before.decode())
            cert.write_bytes(before)
            _, cert_again, key_again = certificates(tmp_path)
            scene.gateway.guard.reload()
            assert await shown(scene.gateway.address) == ssl.PEM_cert_to_DER_cert(cert_again.read_text())
            assert key_again.exists()
        # Whose engines are signed by somebody else gets no answer from them, and says why.
        async with gateway_on(fleet, group) as scene:
            answer = await scene.http.post("/v1/completions", json=PROMPT)
            assert answer.status_code == 502
            assert "certificate verify failed" in answer.text.lower()
        group.cancel_scope.cancel()
    with pytest.raises(BadCredentials, match="can't be used for TLS"):
        guard.check(Guarded(tls_cert=ca))


async def shown(address: tuple[str, int]) -> bytes | None:
    """The certificate that a server shows, as DER."""
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    async with await anyio.connect_tcp(*address, tls=True, ssl_context=anyone, tls_standard_compatible=False) as stream:
        return stream.extra(anyio.streams.tls.TLSAttribute.peer_certificate_binary)
