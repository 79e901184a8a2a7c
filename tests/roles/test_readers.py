"""Who reads the log: all are asked at once, and a look at a healthy fleet waits for nobody who is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from kvplane.services.protocol import messages
from kvplane.services.roles.readers import QUIET_SECONDS, readers

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def test_a_look_ends_when_all_have_answered(fleet: Fleet) -> None:
    # There is no historian, and nobody waits a minute to see that.
    await fleet.coordinator(readers_seconds=60.0)
    for _ in range(2):
        await fleet.router()
    with anyio.fail_after(30):
        shown = await fleet.ask("coordinator.format.show", messages.StatusRequest())
    assert sorted(reader["service"] for reader in shown["readers"]) == [
        "kvplane-coordinator", "kvplane-router", "kvplane-router",
    ]  # fmt: skip


async def test_who_answers_late_is_asked_before_a_format_is_raised(fleet: Fleet, client: Client) -> None:
    await fleet.coordinator()
    await fleet.router()
    late = msgspec.json.encode({"metadata": {"fleet": fleet.name, "writer": "late", "format": "1"}})

    async def answer(message: Msg) -> None:
        await anyio.sleep(3 * QUIET_SECONDS)
        await message.respond(late)

    await client.subscribe("$SRV.INFO.kvplane-router", cb=answer)
    await client.flush()
    assert "late" not in {reader["writer"] for reader in await readers(client, fleet.name, quiet=QUIET_SECONDS)}
    assert "late" in {reader["writer"] for reader in await readers(client, fleet.name)}
