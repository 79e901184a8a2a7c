"""Consumers that are aimed at others, or would outlive their owner, go; a key that is taken back leaves nothing."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from nats.js.api import ConsumerConfig

from kvplane.events.errors import LogUnavailable
from kvplane.events.log.deliveries import Deliveries
from kvplane.events.log.inboxes import CONSUMERS, consumer_names
from kvplane.events.log.stream import open_stream
from kvplane.services.roles.strays import Strays
from tests.support.waiting import until
from tests.support.with_credentials import NAME, Guarded, Stranger, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

pytestmark = pytest.mark.anyio

LOG = f"KV_{NAME}"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as running:
        coordinator = await running.connect("coordinator")
        await open_stream(coordinator.jetstream(), NAME, create=True)
        yield running


async def made(stranger: Stranger, number: int, **config: Any) -> dict[str, Any]:
    """A consumer of the log under one of a stranger's names."""
    name = f"{stranger.key}-{number}"
    whole = {"name": name, "ack_policy": "none", "deliver_policy": "all", "inactive_threshold": 30 * 10**9} | config
    body = json.dumps({"stream_name": LOG, "config": whole}).encode()
    answer = await stranger.client.request(f"$JS.API.CONSUMER.CREATE.{LOG}.{name}", body, timeout=5)
    created: dict[str, Any] = json.loads(answer.data)
    return created


async def names(client: Client) -> set[str]:
    return {info.name for info in await client.jetstream().consumers_info(LOG)}


async def test_what_is_aimed_at_others_goes_and_what_is_ones_own_or_the_admins_stays(fleet: Guarded) -> None:
    router = await fleet.stranger("router")
    admin = await fleet.connect("admin")
    own, key = f"_DELIVER.{router.key}.x", router.key
    await router.client.subscribe(own)
    bad: list[dict[str, Any]] = [
        {"deliver_subject": "$SRV.PING", "idle_heartbeat": 10**8},
        {"deliver_subject": "$SRV.PING", "idle_heartbeat": 10**8, "durable_name": f"{key}-1"},
        {"deliver_subject": f"_INBOX.{key}.x"},
        {"deliver_subject": f"_DELIVER.{key}x.y"},
        {"deliver_subject": own, "inactive_threshold": 3600 * 10**9},
        {"deliver_subject": own, "durable_name": f"{key}-5"},
        # One that is pulled from, for ever.
        {"ack_policy": "explicit", "durable_name": f"{key}-6"},
    ]
    for number, config in enumerate(bad):
        assert "error" not in await made(router, number, **config)
    good = len(bad)
    assert "error" not in await made(router, good, deliver_subject=own)
    await admin.jetstream().add_consumer(LOG, ConsumerConfig(name="ours", durable_name="ours"))
    strays = Strays(await fleet.connect("coordinator"), NAME)
    assert await strays.sweep() == len(bad)
    assert await names(admin) == {"ours", f"{key}-{good}"}
    assert await strays.sweep() == 0
    # What the admin made stays until the admin removes it.
    assert await admin.jetstream().delete_consumer(LOG, "ours")


async def test_a_coordinator_looks_by_itself(fleet: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplane.services.roles.strays.LOOK_SECONDS", 0.05)
    coordinator = await fleet.coordinator()
    router = await fleet.stranger("router")
    await made(router, 0, deliver_subject="$SRV.PING", idle_heartbeat=10**8, durable_name=f"{router.key}-0")
    await until(lambda: coordinator.strays.removed)
    assert f"{router.key}-0" not in await names(coordinator.client)


async def test_a_key_that_is_taken_back_leaves_no_connection_and_no_consumer(fleet: Guarded) -> None:
    router = await fleet.stranger("router")
    admin = await fleet.connect("admin")
    await router.client.subscribe(f"_DELIVER.{router.key}.x")
    for number in range(5):
        # As short as a server takes it; kvplane's own have half a minute.
        await made(router, number, deliver_subject=f"_DELIVER.{router.key}.x", inactive_threshold=10**8)
    assert len(await names(admin)) == 5
    fleet.held.remove(NAME, "router")
    fleet.held.save()
    os.kill(fleet.server.pid, signal.SIGHUP)

    async def gone() -> bool:
        return router.client.is_closed and await names(admin) == set()

    await until(gone, 30)


async def test_processes_with_one_key_share_its_names_and_the_last_one_is_told_when_none_is_left(
    fleet: Guarded,
) -> None:
    first, second = await fleet.connect("router"), await fleet.connect("router")
    all_of_them = []
    for number in range(CONSUMERS):
        each = Deliveries((first, second)[number % 2], LOG, "test", lambda *_: None, lambda: None)
        all_of_them.append(each)
        await each.open(first.jetstream(), after=0, heartbeat=1, pending_bytes=1 << 20)
    key = fleet.held.find(NAME, "router")
    assert key is not None
    assert {each.name for each in all_of_them} == set(consumer_names(key.key))
    late = Deliveries(first, LOG, "test", lambda *_: None, lambda: None)
    with pytest.raises(LogUnavailable, match="kvplane auth add"):
        await late.open(first.jetstream(), after=0, heartbeat=1, pending_bytes=1 << 20)
    # Who leaves makes room at once.
    await all_of_them[7].close()
    await late.open(first.jetstream(), after=0, heartbeat=1, pending_bytes=1 << 20)
    assert late.name == all_of_them[7].name
    for each in (*all_of_them, late):
        await each.close()
    assert await names(await fleet.connect("admin")) == set()
