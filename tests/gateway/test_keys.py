"""Keys at the gateway: who is let in, how much, and what of it the log and the engines see."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import anthropic
import anyio
import openai
import pytest
from structlog.testing import capture_logs

from kvplane.services.gateway.guard import Guarded
from tests.support.gateways import PROMPT, answers, made, on_engines
from tests.support.keys import bearer, make_key
from tests.support.scripted_engine import EVENTS, MODEL, ScriptedEngine, chunk
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import SocketStream

    from kvplane.services.tenancy.doors import Doors
    from tests.support.fleet import Fleet
    from tests.support.gateways import Scene

DONE = b"data: [DONE]\n\n"


def doors_of(scene: Scene) -> Doors:
    assert scene.gateway.guard.doors is not None
    return scene.gateway.guard.doors


def has_seen(engine: ScriptedEngine, count: int) -> bool:
    return len(engine.requests) == count


async def test_who_has_no_key_is_told_so_in_the_form_of_the_api(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    right, other = make_key(file, "a"), make_key(file, "b", ("another",))
    engine = ScriptedEngine("e", answers)
    async with on_engines(fleet, engine, guarded=Guarded(keys=file)) as scene:
        url = scene.url
        for wrong in ("", "x", right[:-1], right + "x", right.upper(), "é", "y" * 5000):
            async with made(base_url=f"{url}/v1", api_key=wrong or "?", max_retries=0) as client:
                with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)) as caught:
                    await client.completions.create(**PROMPT)
            if isinstance(caught.value, openai.AuthenticationError):
                assert caught.value.code == "invalid_api_key"
        paths = ["/v1/completions", "/v1/models", "/route", "/v1/embeddings", "/tokenize", "/nonsense", "/v1/messages"]
        refused = [await scene.http.post(path, json=PROMPT) for path in paths]
        assert [answer.status_code for answer in refused] == [401] * len(paths)
        assert refused[-1].json() == {
            "type": "error",
            "error": {"type": "authentication_error", "message": refused[-1].json()["error"]["message"]},
        }
        assert refused[0].headers["www-authenticate"] == "Bearer"
        assert (await scene.http.get("/health")).status_code == 200
        assert not engine.requests

        async with anthropic.AsyncAnthropic(base_url=url, api_key=other, max_retries=0) as asks:
            with pytest.raises(anthropic.PermissionDeniedError, match="is for another"):
                await asks.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "x"}])
        answer = await scene.http.post("/v1/completions", json=PROMPT, headers={"x-api-key": right})
        assert answer.status_code == 200
        for path, body in (
            ("/v1/completions", PROMPT),
            ("/v1/embeddings", {"input": "x"}),
            ("/route", {"model": MODEL, "tokens": [1], "dry_run": True}),
        ):
            answer = await scene.http.post(path, json=body, headers=bearer(other))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed")
        # Engines have more than tenants should: what loads models, and what is kept of others' requests.
        for path in ("/v1/load_lora_adapter", "/v1/responses/resp_1", "/v1/files", "/v1/chat/completions/x"):
            answer = await scene.http.post(path, json={"model": MODEL}, headers=bearer(right))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed")
        answer = await scene.http.post("/v1/embeddings", content=b"model=m", headers=bearer(other))
        assert answer.status_code == 403
        assert (await scene.http.post("/v1/embeddings", json={"input": "x"}, headers=bearer(right))).status_code == 200
        # A decision that is recorded could be ended by nobody.
        body = {"model": MODEL, "tokens": [1]}
        assert (await scene.http.post("/route", json=body, headers=bearer(right))).status_code == 403
        assert (
            await scene.http.post("/route", json={**body, "dry_run": True}, headers=bearer(right))
        ).status_code == 200
        names = [
            [each["id"] for each in (await scene.http.get("/v1/models", headers=bearer(each))).json()["data"]]
            for each in (right, other)
        ]
        assert names == [[MODEL], []]
        await scene.idle()
        routed, _ = await scene.recorded()
        assert [event.tenant for event in routed] == ["a"]
        assert scene.gateway.measured.unauthorized >= len(paths)


async def test_engines_see_their_own_key_and_nothing_that_steers_them(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = make_key(file, "a")
    engine = ScriptedEngine("e", answers)
    steering = {
        "x-data-parallel-rank": "3", "X_Data_Parallel_Rank": "3", "x-worker-instance-id": "7",
        "x-gateway-destination-endpoint": "h:1", "x-smg-target-worker": "0", "x-kvplane-decision": "x",
        "x-prefiller-host-port": "h:1", "connection": "keep-alive, x-mine", "x-mine": "hop",
        "proxy-authorization": "Basic x", "te": "trailers", "x-api-key": secret, "api-key": secret, "x-kept": "yes",
    }  # fmt: skip
    async with on_engines(fleet, engine, guarded=Guarded(keys=file, engine_key="of-engines")) as scene:
        for path in ("/v1/completions", "/v1/embeddings"):
            answer = await scene.http.post(path, json=PROMPT, headers=steering)
            assert answer.status_code == 200
    for request in engine.requests:
        head = request.partition(b"\r\n\r\n")[0].lower()
        assert secret.encode().lower() not in head
        assert head.count(b"authorization: bearer of-engines") == head.count(b"authorization") == 1
        assert b"x-kept: yes" in head
        seen = {line.partition(b":")[0].replace(b"_", b"-").decode() for line in head.split(b"\r\n")[1:]}
        assert seen.isdisjoint({name.lower().replace("_", "-") for name in steering} - {"x-kept"})
    assert len(engine.requests) == 2


async def test_without_keys_what_the_client_sends_goes_to_the_engine_as_before(fleet: Fleet) -> None:
    engine = ScriptedEngine("e", answers)
    async with on_engines(fleet, engine) as scene:
        await scene.http.post("/v1/completions", json=PROMPT, headers={"authorization": "Bearer own", "x-api-key": "k"})
        routed, _ = await scene.recorded()
    assert b"authorization: Bearer own\r\n" in engine.requests[0]
    assert b"x-api-key: k\r\n" in engine.requests[0]
    assert [event.tenant for event in routed] == [""]


async def test_limits_are_said_and_held(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    few, small = make_key(file, "few", requests_per_minute=3), make_key(file, "small", tokens_per_minute=30)
    async with on_engines(fleet, ScriptedEngine("e", answers), guarded=Guarded(keys=file)) as scene:

        async def ask(secret: str, **more: Any) -> Any:
            return await scene.http.post("/v1/completions", json={**PROMPT, **more}, headers=bearer(secret))

        left = [(await ask(few)).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
        assert left == ["2", "1", "0"]
        refused = await ask(few)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        # Nine tokens a prompt and one an answer.
        statuses = []
        for _ in range(4):
            answer = await ask(small)
            statuses.append(answer.status_code)
            await scene.idle()
        assert statuses == [200, 200, 200, 429]
        assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
        too_large = await ask(small, prompt=list(range(31)))
        assert too_large.status_code == 429
        large = make_key(file, "large", tokens_per_minute=30)
        scene.gateway.guard.reload()
        too_large = await ask(large, prompt=list(range(31)))
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "request_too_large")
        assert (await ask(large)).status_code == 200
        limited = {tenant: counted.limited for tenant, counted in doors_of(scene).measured.all.items()}
        assert limited == {"few": {"requests": 1}, "small": {"tokens": 2}, "large": {"tokens": 1}}


async def test_so_many_at_once_and_whoever_leaves_gives_the_place_back(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = make_key(file, "a", concurrent=2)
    go_on = anyio.Event()

    async def streams(stream: SocketStream) -> None:
        await stream.send(EVENTS + chunk(b'data: {"choices": []}\n\n'))
        await go_on.wait()
        await stream.send(chunk(DONE) + b"0\r\n\r\n")

    engine = ScriptedEngine("e", streams)
    async with on_engines(fleet, engine, guarded=Guarded(keys=file)) as scene, anyio.create_task_group() as group:
        statuses: list[int] = []

        async def ask(scope: anyio.CancelScope) -> None:
            # Names that clients choose are no way around: a name that is on its way is another request's.
            headers = bearer(secret) | {"x-request-id": "same"}
            with scope:
                answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True}, headers=headers)
                statuses.append(answer.status_code)

        scopes = [anyio.CancelScope() for _ in range(4)]
        for at in range(2):
            group.start_soon(ask, scopes[at])
            await until(partial(has_seen, engine, at + 1))
        await ask(scopes[2])
        assert statuses == [429]
        scopes[0].cancel()
        await until(lambda: scene.gateway.server.open == 1)
        group.start_soon(ask, scopes[3])
        await until(lambda: len(engine.requests) == 3)
        go_on.set()
        await until(lambda: len(statuses) == 3)
        assert statuses == [429, 200, 200]
        routed, _ = await scene.recorded()
        assert [event.request == "same" for event in routed] == [True, False, True]
        used = doors_of(scene).used.of("a", 0)
        assert (used.here, used.elsewhere) == (0, 0)


async def test_keys_are_read_again_and_a_broken_file_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = make_key(file, "a")
    async with on_engines(fleet, ScriptedEngine("e", answers), guarded=Guarded(keys=file)) as scene:

        async def status(secret: str) -> int:
            return (await scene.http.post("/v1/completions", json=PROMPT, headers=bearer(secret))).status_code

        whole_file = file.read_bytes()
        twice = json.loads(whole_file)
        twice["keys"] *= 2
        for broken in (b"", b"{", b"[]", whole_file[:-20], b'{"keys": [{"name": "x"}]}', json.dumps(twice).encode()):
            file.write_bytes(broken)
            with capture_logs() as logs:
                scene.gateway.guard.reload()
            assert [line["event"] for line in logs] == ["keys_not_reloaded"]
            assert await status(secret) == 200
        file.unlink()
        scene.gateway.guard.reload()
        assert await status(secret) == 200
        file.write_bytes(whole_file)
        new = make_key(file, "a")
        assert (await status(secret), await status(new)) == (200, 401)
        scene.gateway.guard.reload()
        assert (await status(secret), await status(new)) == (401, 200)


async def test_conversations_of_one_name_are_each_tenants_own(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secrets = [make_key(file, name) for name in ("a", "b" * 120)]
    async with on_engines(fleet, ScriptedEngine("e", answers), guarded=Guarded(keys=file)) as scene:
        for secret in secrets:
            await scene.http.post("/v1/completions", json=PROMPT, headers={**bearer(secret), "x-session-id": "s" * 20})
        routed, _ = await scene.recorded()
    assert routed[0].session == "a/" + "s" * 20
    assert routed[1].session != routed[0].session
    assert len(routed[1].session) == 32
