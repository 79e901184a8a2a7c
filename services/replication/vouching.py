"""Whether running replicas vouch for a past that did not come from the log.

A historian's credentials let it answer for the history, not for the fleet's state. What it gives a replica to begin with is
folded on to where running replicas are, and must have their digest there: that of all coordinators that answer, whose
credentials nobody else has, or, where none runs, of all routers. One that lies can keep a true past out, and can't let a false
one in as long as another tells the truth; no majority is asked for, since one router can pretend to be many.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import anyio
import structlog
from msgspec import UNSET
from nats.errors import Error as NatsError

from kvplane.events.errors import LogError
from kvplane.events.log.follow import replay
from kvplane.projections.digest import digest
from kvplane.projections.snapshot import load
from kvplane.services.process.forked import in_copy
from kvplane.services.process.version import package_version
from kvplane.services.protocol.errors import NotVouched, ServiceFault
from kvplane.services.protocol.messages import StatusRequest
from kvplane.services.protocol.status import ReplicaStatus
from kvplane.services.rpc.client import ask, of_fleet

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.projections.fleet import FleetState

LIST_SECONDS = 1.0
DIGEST_SECONDS = 60.0
"""How long a replica may take for its digest."""

_log = structlog.get_logger("kvplane.replica")


class _Claim(NamedTuple):
    """What a replica says of itself."""

    writer: str
    sequence: int
    digest: str


async def check(client: Client, fleet: str, data: bytes, own: str) -> None:
    """Compare a snapshot that a historian gave with what running replicas hold. `own` is the writer who asks.

    Raises `NotVouched`, `LogUnavailable`, or `BadSnapshot`.
    """
    state = load(fleet, data)
    claims = await _claims(client, fleet, "coordinator", own) or await _claims(client, fleet, "router", own)
    claims = [claim for claim in claims if claim.sequence >= state.sequence]
    if not claims:
        raise NotVouched(
            f"no replica of this version ({package_version()}) runs that could vouch for what a historian gives; if you trust "
            "the historian, start a coordinator with --trust-history"
        )
    against = 0
    for claim in sorted(claims, key=lambda claim: claim.sequence):
        if claim.digest != await _digest_at(client, state, claim.sequence):
            against += 1
            _log.error(
                "history_differs", fleet=fleet, sequence=claim.sequence, replica=claim.writer,
                remedy="`kvplane auth list` shows who may be a historian; take back the key of one that is not yours",
            )  # fmt: skip
    if against:
        raise NotVouched(
            f"what a historian gives is not the state of {against} of {len(claims)} running replicas; is it yours?"
        )


async def _digest_at(client: Client, state: FleetState, sequence: int) -> str:
    await replay(client, state.fleet, state.apply, applied=state.sequence, last=sequence)
    return (await in_copy(partial(_digest, state))).data.getvalue().decode()


def _digest(state: FleetState) -> bytes:
    return digest(state).encode()


async def _claims(client: Client, fleet: str, kind: str, own: str) -> list[_Claim]:
    """Digests of all replicas of a kind that run; those of another version may fold otherwise, and say nothing."""
    found: list[_Claim] = []

    async def one(writer: str) -> None:
        try:
            status = await ask(
                client, f"kv.{fleet}.{kind}.{writer}.status", StatusRequest(digest=True), ReplicaStatus, seconds=DIGEST_SECONDS
            )  # fmt: skip
        except (ServiceFault, LogError, NatsError) as error:
            _log.debug("replica_does_not_vouch", writer=writer, error=str(error))
            return
        if status.ready and status.digest is not UNSET and status.version == package_version():
            found.append(_Claim(status.writer, status.sequence, status.digest))

    try:
        listed = await of_fleet(client, f"kvplane-{kind}", fleet, seconds=LIST_SECONDS)
    except (NatsError, OSError) as error:
        _log.debug("replicas_not_listed", error=repr(error))
        return found
    async with anyio.create_task_group() as group:
        for writer in {each.get("writer", "") for each in listed} - {own, ""}:
            group.start_soon(one, writer)
    return found
