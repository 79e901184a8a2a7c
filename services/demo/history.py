"""The history, as steps of the demonstration: nothing lost, the past rebuilt, decisions explained, another policy tried."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from kvplane.events import types
from kvplane.events.log.stream import open_stream
from kvplane.services.demo.stage import check
from kvplane.services.history.client import table
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoAnswer, Refused, StepFailed
from kvplane.services.protocol.status import HistoryStatus
from kvplane.services.rpc.client import ask
from kvplane.services.simulation.compare import parse_choice
from kvplane.services.whatif import replay
from kvplane.services.whatif.recording import recorded_span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvplane.services.demo.stage import Stage

READY_SECONDS = 30.0
EXPLAINED = 8
"""Decisions that are made again, from all over the demonstration."""
OTHER = "cascade"

_TABLES: dict[str, tuple[type, ...]] = {
    "node_changes": (
        types.NodeRegistered, types.NodeCordoned, types.NodeUncordoned, types.NodeLost, types.NodeRecovered, types.NodeRemoved,
    ),
    "cache_changes": (types.BlocksStored, types.BlocksRemoved, types.BlocksPlaced, types.CacheCleared),
    "session_changes": (types.SessionAssigned, types.SessionEnded),
    "decisions": (types.RequestRouted,),
    "completions": (types.RequestCompleted,),
    "policy_changes": (types.PolicyChanged,),
    "format_changes": (types.FormatRaised,),
}  # fmt: skip


async def _sql(stage: Stage, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await table(stage.client, stage.fleet.name, query)).to_pylist()
    return rows


async def caught_up(stage: Stage) -> int:
    """Wait until the history holds what is on the log; the sequence."""
    name = stage.fleet.name
    with anyio.move_on_after(READY_SECONDS):
        while True:
            try:
                request = messages.StatusRequest()
                stored = (await ask(stage.client, f"kv.{name}.history.status", request, HistoryStatus)).stored
            except (NoAnswer, Refused):
                stored = 0
            log = await open_stream(stage.client.jetstream(), name)
            if stored >= log.last_seq:
                return stored
            await anyio.sleep(0.05)
    raise StepFailed(f"the history did not hold the log after {READY_SECONDS:g} s")


async def nothing_lost(stage: Stage) -> str:
    """After two kills of the historian every event that was applied is in the history, once."""
    last = await caught_up(stage)
    await stage.reached(last)
    events = Counter(type(event) for sequence, event in stage.events if sequence <= last)
    counted = {}
    for name, kinds in _TABLES.items():
        (row,) = await _sql(stage, f"SELECT count(*) AS n FROM {name} WHERE sequence <= {last}")  # noqa: S608 - own names
        counted[name] = row["n"]
        wanted = sum(events[kind] for kind in kinds)
        check(row["n"] == wanted, f"{name} has {row['n']} rows, the log {wanted} such events")
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counted.items())


async def time_travel(stage: Stage) -> str:
    """The state at a past sequence has the digest that a fold up to it has."""
    middle = stage.state.sequence // 2
    answer: dict[str, Any] = await ask(
        stage.client, f"kv.{stage.fleet.name}.history.state", messages.MomentRequest(at=str(middle)), seconds=60
    )
    digest = await stage.digest_at(middle)
    check(answer["digest"] == digest, f"the digest at {middle} was {digest}, the history says {answer['digest']}")
    return f"at sequence {middle} there were {answer['memberships']:,} blocks and {answer['sessions']} sessions; same digest"


async def explained(stage: Stage) -> str:
    """Decisions from all over the demonstration are made again from the log, and agree with what was recorded."""
    requests = [row["request"] for row in await _sql(stage, "SELECT request FROM decisions ORDER BY sequence, event")]
    step = max(1, len(requests) // EXPLAINED)
    chosen = requests[step // 2 :: step][:EXPLAINED]
    terms = ""
    for request in chosen:
        answer: dict[str, Any] = await ask(
            stage.client, f"kv.{stage.fleet.name}.explain", messages.ExplainRequest(request=request), seconds=60
        )
        check(
            answer["verdict"] == "agrees",
            f"{request}: {answer['verdict']}: {answer.get('recomputed', {}).get('differences')}",
        )
        best = answer["recomputed"]["candidates"][0]
        terms = f"{best['node']} for " + ", ".join(
            f"{term} {value:.3g}" for term, value in best["terms"].items() if value
        )
    return f"{len(chosen)} decisions agree with what was recorded; the last one chose {terms}"


async def another_policy(stage: Stage) -> str:
    """The recorded requests go through another policy, on simulated nodes."""
    span, _, _ = await recorded_span(stage.client, stage.fleet.name, None, None, warm=0)
    choices = [None, parse_choice(OTHER)]
    outcomes = await anyio.to_thread.run_sync(lambda: replay.simulate(span.recorded, choices, routers=2, processes=2))
    really, again, other = replay.compared([span.really, *outcomes], span.counted)
    check(bool(really), "no request was served in all of them")
    figures = [
        replay.summarize(name, served, 0) for name, served in (("really", really), ("simulated", again), (OTHER, other))
    ]
    rates = ", ".join(f"{each.policy} {each.hit_rate:.1%}" for each in figures)
    return f"{len(really):,} requests; tokens cached: {rates}"


STEPS: list[tuple[str, Callable[[Stage], Awaitable[str]]]] = [
    ("history: nothing lost, nothing twice", nothing_lost),
    ("history: time travel", time_travel),
    ("history: why", explained),
    ("history: what if", another_policy),
]
