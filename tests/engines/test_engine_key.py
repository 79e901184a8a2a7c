"""Engines that ask for a key, and what else fails before one is attached: said within seconds, by its latest cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from structlog.testing import capture_logs

from kvplane.services.cli.attach import Attached, _attach
from kvplane.services.cli.common import COMMON
from kvplane.services.engines.facts import Engine, check
from kvplane.services.process import logs
from kvplane.services.protocol.errors import BadRequest, EngineUnfit
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio
KEY = "sk-secret-7"


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("guards", ["/v1", "/"])
async def test_the_key_goes_with_every_request(fleet: Fleet, kind: str, guards: str) -> None:
    """vLLM guards `/v1` alone, SGLang all."""
    await fleet.coordinator()
    engine = FakeEngine(kind)
    engine.key, engine.guards = KEY, guards
    logs.configure("debug")
    with capture_logs() as lines:
        async with running(engine), attaching(fleet, engine.url, kind=kind, key=KEY) as live:
            await live.member()
            await until(lambda: live.service.adapters[0]._gauges)
            assert live.service.adapters[0]._gauges.active == 3  # type: ignore[union-attr]
    assert "node_registered" in str(lines)
    assert KEY not in str(lines)


@pytest.mark.parametrize(
    ("key", "guards", "says"),
    [
        ("", "/v1", "/v1/models answers 401: it asks for a key; give --api-key, or KVPLANE_API_KEY"),
        ("", "/", "/health answers 401: it asks for a key; give --api-key, or KVPLANE_API_KEY"),
        ("wrong", "/v1", "/v1/models answers 401: it does not take the key that was given"),
        ("", "/metrics", "/metrics answers 401: it asks for a key"),
        ("", "/kv_event_sources", "/kv_event_sources answers 401: it asks for a key"),
    ],
)
async def test_that_a_key_is_asked_for_is_said(key: str, guards: str, says: str) -> None:
    engine = FakeEngine()
    engine.key, engine.guards = KEY, guards
    async with running(engine), Engine("vllm", engine.url, key=key) as http:
        health = await http.health()
        if health.well:
            facts = await http.facts()
            with pytest.raises(EngineUnfit) as caught:
                check("vllm", facts, facts.sources)
            assert engine.url + says in str(caught.value)
        else:
            assert health.final
            assert engine.url + says in health.reason


async def test_what_the_adapter_does_not_need_may_be_refused(fleet: Fleet) -> None:
    await fleet.coordinator()
    engine = FakeEngine()
    engine.key, engine.guards = KEY, "/kv_event_sources"
    async with running(engine), attaching(fleet, engine.url, events=engine.endpoint) as live:
        await live.member()


async def test_a_wrong_path_is_no_engine_whatever_answers_there(fleet: Fleet) -> None:
    engine = FakeEngine()
    engine.missing = {"/v1/models"}
    async with running(engine), attaching(fleet, engine.url) as live:
        assert f"{engine.url}/v1/models answers 404, and {engine.url}/health answers 200" in await live.ended()


async def test_the_latest_cause_is_the_one_that_is_told(fleet: Fleet) -> None:
    engine = FakeEngine()
    engine.loading = True
    async with running(engine), attaching(fleet, engine.url, wait=600) as live:
        await until(lambda: "answers 503" in live.service.readiness().reason)
        engine.key, engine.loading = KEY, False
        assert (await live.ended()).startswith(f"there is no engine: {engine.url}/health answers 401")
    engine = FakeEngine()
    engine.loading = True
    async with running(engine), attaching(fleet, engine.url, wait=1) as live:
        assert (await live.ended()).startswith(
            f"{engine.url}/health answers 503; no engine is well at {engine.url} after 1 s"
        )


async def test_the_key_is_not_sent_to_whom_the_engine_redirects() -> None:
    """Another host must not learn it."""
    seen: list[bytes] = []

    async def other(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            seen.append(await stream.receive())
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    async def engine(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            seen.append(await stream.receive())
            await stream.send(
                b"HTTP/1.1 302 Found\r\nLocation: http://localhost:%d/x\r\nContent-Length: 0\r\n\r\n" % port
            )

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as there,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as here,
        anyio.create_task_group() as group,
    ):
        port: int = there.extra(anyio.abc.SocketAttribute.local_port)
        group.start_soon(there.serve, other)
        group.start_soon(here.serve, engine)
        url = f"http://127.0.0.1:{here.extra(anyio.abc.SocketAttribute.local_port)}"
        async with Engine("vllm", url, key=KEY) as http:
            await http.load()
        group.cancel_scope.cancel()
    assert KEY.encode() in seen[0]
    assert KEY.encode() not in seen[1]


def test_a_key_that_no_header_takes_is_refused() -> None:
    given = Attached(engine="http://127.0.0.1:1", node="a", api_key="a\nb")
    with pytest.raises(BadRequest, match="--api-key holds a character that no HTTP header takes"):
        _attach("vllm", given, COMMON)
