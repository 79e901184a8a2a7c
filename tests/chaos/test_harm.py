"""What hostile members do is found: planted harm, each of its kind."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
import pytest

from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from tests.chaos import harm as harming
from tests.chaos.checker import Checker
from tests.chaos.harm import ATTACKERS, Harm, Phase
from tests.chaos.hostile import EVIL, Member
from tests.chaos.ledger import Ledger
from tests.chaos.network import network
from tests.chaos.world import FLEET, Servers, World
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[World]:
    """One server that asks for credentials, and nobody else."""
    world = World(folder, await network("none"), Ledger(), servers=1, guarded=True)
    world._make_credentials()
    world.servers = Servers(folder / "servers", world.net, world.names, held=world.held)
    try:
        await world.servers.start(*world.names)
        yield world
    finally:
        await world.servers.kill(*world.names)


async def test_routes_that_become_slow_are_found(tmp_path: Path) -> None:
    world = World(tmp_path, await network("none"), Ledger(), servers=1)
    for times, slow in ((1, False), (9, True)):
        checker = Checker(FLEET)
        harm = Harm(world, checker, 1)
        lines = [f"{at} {0.03 * (times if at >= 50 else 1)}\n" for at in range(100)]
        harm._file.write_text("".join(lines) + "99")
        harm._usual, harm._attacked = Phase(0, 50), [Phase(50, 100)]
        assert harm.times()["usual"]["p99"] == 0.03
        found = [violation.rule for violation in checker.found]
        assert ("others' routes" in found) is slow
        # Nobody has attacked here, and that is found as well.
        assert "attacked" in found


async def test_what_outgrows_the_bound_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(tmp_path) as world:
        checker = Checker(FLEET)
        harm = Harm(world, checker, 1)
        before = world.servers.members["nats-1"].process
        monkeypatch.setattr(harming, "MOST_BYTES", 1 << 20)
        await harm.look()
        assert [violation.rule for violation in checker.found] == ["memory"]
        assert before is not None
        assert before.returncode is not None
        monkeypatch.setattr(harming, "MOST_BYTES", 1 << 40)
        await harm.look()
        assert len(checker.found) == 1
        assert harm.most_bytes["nats-1"] > 1 << 20


async def test_what_is_left_of_one_that_was_revoked_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(tmp_path) as world, world.client("admin") as admin:
        await open_stream(admin.jetstream(), FLEET, create=True)
        checker = Checker(FLEET)
        harm = Harm(world, checker, 1)
        seeds = {role: world.let_in(role, EVIL) for role in ATTACKERS}
        assert world.held is not None
        async with connected(world.urls("harness"), EVIL, credentials=seeds["node"], ca=world.held.ca) as evil:
            # One of its moves is a refusal and no more: it is let in, and attacks.
            member = Member(evil, "node", FLEET, 1)
            await member.send(f"cache.{EVIL}", b"junk")
            await evil.flush()

            async def stored() -> bool:
                return (await open_stream(admin.jetstream(), FLEET)).last_seq > 0

            await until(stored)
        await harm.revoke()
        assert checker.found == []
        for role in ATTACKERS:
            world.let_in(role, EVIL)
        config = {"name": f"{EVIL}-1", "durable_name": f"{EVIL}-1", "deliver_subject": "x", "ack_policy": "none"}
        body = msgspec.json.encode({"stream_name": f"KV_{FLEET}", "config": config})
        answer = await admin.request(f"$JS.API.CONSUMER.CREATE.KV_{FLEET}.{EVIL}-1", body)
        assert b'"created"' in answer.data
        monkeypatch.setattr(harming, "LEFT_SECONDS", 3)
        await harm.revoke()
        assert [violation.rule for violation in checker.found] == ["nothing left"]
