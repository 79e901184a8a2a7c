"""A node's own side: what it hears of itself, in a real fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.services.control import commands
from kvplane.services.membership.member import Conclusion, Member, conclusions
from kvplane.services.protocol import labels, messages
from kvplane.services.protocol.errors import NoAnswer
from tests.support.waiting import until

if TYPE_CHECKING:
    from kvplane.services.protocol.errors import ServiceFault
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


def registration(writer: str) -> messages.RegisterRequest:
    return messages.RegisterRequest(
        node="a", address="x", models=["m"], block_size=4, capacity_blocks={"gpu": 8}, replace=True,
        labels={labels.ADAPTER: writer},
    )  # fmt: skip


async def test_a_node_hears_what_is_concluded_of_it_and_of_no_other(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    concluded: list[Conclusion] = []
    failed: list[ServiceFault] = []
    member = Member(fleet.client, fleet.name, "a", concluded.append, writer="one")
    await member.listen()
    epoch = await member.register(registration("one"), failed.append)
    assert epoch == member.epoch == coordinator.state.nodes["a"].epoch
    await coordinator.commit(commands.lost, messages.NodeRequest(node="a"), "a")
    await until(lambda: concluded == [Conclusion.FORGOTTEN])
    assert await member.register(registration("one"), failed.append) > epoch
    assert (member.registrations, failed) == (2, [])
    other = Member(fleet.client, fleet.name, "b", concluded.append)
    await other.listen()
    await other.register(
        messages.RegisterRequest(node="b", address="x", models=["m"], block_size=4, capacity_blocks={"gpu": 8}), failed.append
    )  # fmt: skip
    await Member(fleet.client, fleet.name, "a", concluded.append).register(registration("two"), failed.append)
    await until(lambda: concluded == [Conclusion.FORGOTTEN, Conclusion.TAKEN])
    await fleet.ask("coordinator.node.remove", messages.NodeRequest(node="a"))
    await until(lambda: concluded == [Conclusion.FORGOTTEN, Conclusion.TAKEN, Conclusion.REMOVED])


async def test_a_node_that_was_away_asks_what_was_concluded(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    concluded: list[Conclusion] = []
    own = await fleet.connect("own")
    member = Member(own, fleet.name, "a", concluded.append, writer="one")
    # It does not listen: it learns by asking alone.
    await member.register(registration("one"), lambda _: None)
    async with anyio.create_task_group() as group:
        group.start_soon(member.check)
        await anyio.lowlevel.checkpoint()
        await coordinator.commit(commands.lost, messages.NodeRequest(node="a"), "a")
        await own.force_reconnect()
        await until(lambda: concluded == [Conclusion.FORGOTTEN])
        group.cancel_scope.cancel()


async def test_who_can_not_register_is_told_and_goes_on(fleet: Fleet) -> None:
    member = Member(fleet.client, fleet.name, "a", lambda _: None)
    failed: list[ServiceFault] = []

    def give_up(error: ServiceFault) -> None:
        failed.append(error)
        if len(failed) == 2:
            raise error

    with pytest.raises(NoAnswer):
        await member.register(registration(""), give_up)
    assert (len(failed), member.epoch) == (2, 0)
    # Nor is there anything to leave.
    await member.leave("done")


def test_what_is_no_commit_says_nothing() -> None:
    assert conclusions(b"junk", "") == []
