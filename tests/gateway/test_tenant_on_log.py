"""The tenant of a decision: on the log, in the history and in what explains it; and to those who don't know it, nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from kvplane.events import codec, types
from kvplane.events.codec import decode_body
from kvplane.events.errors import BadCommit
from kvplane.projections.digest import digest
from kvplane.projections.history import replay
from kvplane.projections.history.store import LIVE, Store
from kvplane.projections.history.tables import LACKING
from kvplane.services.gateway.guard import Guarded
from kvplane.services.protocol import messages
from kvplane.services.tenancy import measured
from kvplane.services.tenancy.measured import OTHERS, ByTenant, Tokens
from tests.support.fold_given import Given, registered
from tests.support.gateways import PROMPT, answers, on_engines
from tests.support.historians import historian, question
from tests.support.history_stores import write_history
from tests.support.http_of_services import observed
from tests.support.keys import bearer, make_key
from tests.support.scripted_engine import ScriptedEngine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fleet import Fleet

EVENT = {"type": "RequestRouted.1", "request": "r", "model": "m", "node": "a", "match": 0, "blocks": 0, "tokens": 1}


def log_of(*tenants: str) -> Given:
    log = Given()
    log.node(registered("a"))
    for at, tenant in enumerate(tenants):
        assert (
            log.put("access", "w", types.RequestRouted(f"r{at}", "m", "a", 0, 0, 33, decided=5, tenant=tenant)) is None
        )
    return log


@pytest.mark.parametrize("tenant", [7, None, "x" * 129, ["deep"], {"a": 1}, b"\xff", 1.5])
def test_a_tenant_that_is_none_is_to_newer_readers_what_it_is_to_older_ones(tenant: object) -> None:
    body = msgspec.msgpack.encode([{**EVENT, "tenant": tenant}])
    (found,) = decode_body("access", body)
    assert found == types.RequestRouted("r", "m", "a", 0, 0, 1)
    if not isinstance(tenant, bytes):
        assert list(decode_body("access", json.dumps([{**EVENT, "tenant": tenant}]).encode())) == [found]
    with pytest.raises(BadCommit):
        decode_body("access", msgspec.msgpack.encode([{**EVENT, "tenant": tenant, "tokens": "many"}]))
    # That of a request that is held is no later field: all readers refuse it alike.
    held = {"type": "RequestHeld.1", "request": "r", "model": "m", "tokens": 1, "tenant": tenant}
    if tenant != "x" * 129:
        with pytest.raises(BadCommit):
            decode_body("access", msgspec.msgpack.encode([held]))


def test_no_fold_reads_it_and_who_has_none_writes_the_same_bytes() -> None:
    assert digest(log_of("a", "b", "").state) == digest(log_of("", "", "").state)
    assert b"tenant" not in codec.encode([types.RequestRouted("r", "m", "a", 0, 0, 1)])


def test_the_history_keeps_it_and_one_of_a_former_version_gets_it(tmp_path: Path) -> None:
    log = log_of("", "")
    store = Store(tmp_path, "f")
    write_history(store, log.messages, len(log.messages))
    for table, column in LACKING[2]:
        store.connection.execute(f"DROP VIEW IF EXISTS main.{table.name}")
        store.connection.execute(f"ALTER TABLE {LIVE}.{table.name} DROP COLUMN {column.name}")
    store.connection.execute("UPDATE checkpoint SET version = 2")
    store.close()

    log.put("access", "w", types.RequestRouted("later", "m", "a", 0, 0, 33, decided=5, tenant="shop"))
    store = Store(tmp_path, "f")
    assert store.raised
    write_history(store, log.messages, len(log.messages))
    found = store.connection.execute("SELECT request, tenant FROM decisions ORDER BY sequence").fetchall()
    assert found == [("r0", None), ("r1", None), ("later", "shop")]
    made = list(replay.messages(store.fetch, "f", 0, len(log.messages)))
    assert [codec.decode("f", message).events for message in made] == [
        list(codec.decode("f", message).events) for message in log.messages
    ]
    store.close()


async def test_sql_explain_and_metrics_say_whose_request_it_was(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret = make_key(file, "shop", requests_per_minute=1)
    async with on_engines(fleet, ScriptedEngine("e", answers), guarded=Guarded(keys=file)) as scene:
        answer = await scene.http.post("/v1/completions", json=PROMPT, headers=bearer(secret))
        assert answer.status_code == 200
        assert (await scene.http.post("/v1/completions", json=PROMPT, headers=bearer(secret))).status_code == 429
        assert (await scene.http.post("/v1/completions", json=PROMPT)).status_code == 401
        await scene.idle()
        async with observed(scene.gateway) as http:
            found = await http.metrics()
        assert found("kvplane_gateway_tenant_requests_total", tenant="shop", ending="ok") == 1
        assert found("kvplane_gateway_tenant_requests_total", tenant="shop", ending="refused") == 1
        assert found("kvplane_gateway_tenant_tokens_total", tenant="shop", kind="prompt") == 9
        assert found("kvplane_gateway_tenant_limited_total", tenant="shop", limit="requests") == 1
        assert found("kvplane_gateway_unauthorized_total") == 1
        assert found("kvplane_gateway_keys") == 1
        await scene.gateway.router.writers.flush()
        async with historian(fleet.url, tmp_path / "history"):
            explained = await question(
                fleet.client, "explain", messages.ExplainRequest(request=answer.headers["x-request-id"])
            )
        assert explained["recorded"]["tenant"] == "shop"
        assert explained["verdict"] == "agrees"


def test_metrics_are_of_so_many_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SHOWN_LIMIT", 3)
    counts = ByTenant()
    for at in range(50):
        counts.ended(f"t{at}", "ok", Tokens(2, -1, 1))
        counts.limited(f"t{at}", "requests")
    assert list(counts.all) == ["t0", "t1", "t2", OTHERS]
    assert counts.all[OTHERS].requests["ok"] == 47
    assert counts.all[OTHERS].tokens == {"prompt": 94, "cached": 0, "output": 47}
    assert sum(each.limited["requests"] for each in counts.all.values()) == 50


async def test_who_asks_over_nats_may_say_whose_it_is(fleet: Fleet) -> None:
    async with on_engines(fleet, ScriptedEngine("e", answers)) as scene:
        asked: dict[str, Any] = {"model": "m", "hashes": b"", "tokens_count": 3}
        await fleet.ask("route", messages.RouteRequest(**asked, tenant="theirs"), messages.RouteAnswer)
        await fleet.ask("route", messages.RouteRequest(**asked), messages.RouteAnswer)
        assert await fleet.refused("route", messages.RouteRequest(**asked, tenant="two\nlines")) == "bad_request"
        routed, _ = await scene.recorded()
    assert [event.tenant for event in routed] == ["theirs", ""]
