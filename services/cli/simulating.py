"""What `simulate` does once its options are read. Slow to load, so that the command shows first that it is at work."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from kvplane.events.subjects import check_name
from kvplane.services.cli.limits import within
from kvplane.services.protocol.errors import BadRequest, BadTrace
from kvplane.services.routing.policies import POLICIES
from kvplane.services.simulation import agents
from kvplane.services.simulation.agents import WORKLOADS, generate_agents
from kvplane.services.simulation.blocksize import MOST_BLOCK_SIZE
from kvplane.services.simulation.catalog import hardware as hardware_of
from kvplane.services.simulation.compare import compare, parse_choice
from kvplane.services.simulation.hardware import Hardware
from kvplane.services.simulation.peer import POLICY as PEER
from kvplane.services.simulation.results import ideal_hit_rate
from kvplane.services.simulation.session_files import read_sessions
from kvplane.services.simulation.trace import Trace, Work, read_trace, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, GENERATED_REQUESTS, generate
from kvplane.services.simulation.world import Change, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.progress import Progress

    from kvplane.services.simulation.results import Summary
    from kvplane.services.simulation.world import Outcome

MOST = 10**12
MOST_SECONDS = 4e9
"""Longest span of virtual time; beyond it nanoseconds are no 64-bit numbers."""
SPREAD_SECONDS = 1800.0
"""Within so long the sessions of a folder begin."""


class Asked(Struct, frozen=True, kw_only=True):
    """The options of `simulate`."""

    trace: str | None
    policy: tuple[str, ...]
    fail: tuple[str, ...]
    join: tuple[str, ...]
    nodes: int
    speedup: float
    seed: int
    delay: float
    routers: int
    most_active: int
    goal: str | None
    hardware: str | None
    capacity: int | None
    block_size: int | None
    limit: int | None
    rate: float | None
    processes: int | None
    keep: bool
    """Whether outcomes are needed, for a picture."""


class Simulated(Struct, frozen=True):
    """What came out of it: the trace and its name, what the policies ran on, and a summary of each."""

    name: str
    trace: Trace
    settings: Settings
    ideal: float
    made: list[tuple[Summary, Outcome | None]]


def simulated(asked: Asked, progress: Progress) -> Simulated:
    """Read the trace and run every policy. Raises `BadRequest`, `BadTrace` or `NotServed`."""
    if not asked.policy:
        raise BadRequest("--policy has no value; name at least one policy, or leave it out")
    asked = with_trace(asked)
    name = asked.trace or ""
    goal = None if asked.goal is None else goal_seconds(asked.goal)
    made_of = hardware_of(asked.hardware) if asked.hardware is not None else Hardware()
    choices = [parse_choice(text) for text in dict.fromkeys(asked.policy)]
    base = Settings(
        nodes=asked.nodes, speedup=asked.speedup, seed=asked.seed, delay=asked.delay, routers=asked.routers,
        most_active=asked.most_active, hardware=made_of,
        changes=(*changes(asked.fail, "fail", joins=False), *changes(asked.join, "join", joins=True)),
    )  # fmt: skip
    check_changes(base)
    task = progress.add_task(f"reading {Path(name).name}", total=None)
    trace = requests(
        name, limit=asked.limit, seed=base.seed, rate=asked.rate, block_size=asked.block_size,
        progress=lambda done, total: progress.update(task, completed=done, total=total or None),
    )  # fmt: skip
    work, size = trace.work, trace.block_size
    span = max(request.arrival for request in work) / base.speedup
    if not span <= MOST_SECONDS:
        raise BadRequest(f"the last request is sent after {span:g} s; the limit is {MOST_SECONDS:g}, see --speedup")
    capacity = asked.capacity if asked.capacity is not None else max(1, made_of.cache_tokens // size)
    base = msgspec.structs.replace(base, capacity=capacity, block_size=size)
    runs = [
        (choice, msgspec.structs.replace(base, policy=choice.policy, parameters=choice.parameters))
        for choice in choices
    ]
    progress.update(task, description="finding what could be cached", total=None)
    ideal = ideal_hit_rate(work, size)
    progress.remove_task(task)
    task = progress.add_task("simulating", total=len(work) * len(runs))
    made = compare(
        runs, work, ideal, processes=asked.processes or os.cpu_count() or 1, keep=asked.keep,
        goal=goal, progress=lambda done: progress.update(task, completed=done),
    )  # fmt: skip
    return Simulated(Path(name).name, trace, base, ideal, made)


def goal_seconds(text: str) -> float:
    """Read a time such as 2s or 500ms. Raises `BadRequest`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m)", text.strip(), re.ASCII)
    if found is None or not float(found[1]):
        raise BadRequest(f"--goal is {text[:40]!r}; write a time with its unit, such as 2s or 500ms")
    return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60}[found[2]]


def with_trace(asked: Asked) -> Asked:
    """The options with the trace: options that take several values have swallowed it when it stands behind them.

    Raises `BadRequest` when there is none.
    """
    if asked.trace is not None:
        return asked
    for option, is_value in (("policy", _is_policy), ("fail", _is_change), ("join", _is_change)):
        values: tuple[str, ...] = getattr(asked, option)
        if values and not is_value(values[-1]):
            last = values[-1]
            if last not in WORKLOADS and not os.path.exists(last) and not Path(last).suffix:  # noqa: PTH110 - long names, too
                raise BadRequest(
                    f"{last!r} is neither a policy ({', '.join(POLICIES)}, or module:attr) nor a trace"
                    if option == "policy"
                    else f"--{option} is {last!r}; write a node and seconds, as in node-3@60"
                )
            if not values[:-1]:
                raise BadRequest(f"--{option} has no value but the trace {last!r}")
            return msgspec.structs.replace(asked, trace=last, **{option: values[:-1]})
    raise BadRequest(
        f"name a trace (a file), or one of {', '.join(WORKLOADS)}: kvplane simulate TRACE --policy ttft blocks"
    )


def _is_policy(text: str) -> bool:
    name = text.partition(":")[0]
    return name in POLICIES or name == PEER or (":" in text and not os.path.exists(text))  # noqa: PTH110 - long names, too


def _is_change(text: str) -> bool:
    return "@" in text and not os.path.exists(text)  # noqa: PTH110 - long names, too


def requests(
    trace: str, *, limit: int | None, seed: int, rate: float | None, block_size: int | None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Trace:  # fmt: skip
    """A trace, or a generated workload. Raises `BadRequest` or `BadTrace`."""
    within(limit, "limit", 1, MOST)
    within(rate, "rate", 1e-3, 1e6)
    if trace in WORKLOADS and not Path(trace).exists():
        size = agents.DEFAULT.block_size if trace == agents.NAME else GENERATED_BLOCK_SIZE
        if block_size not in {None, size}:
            raise BadRequest(f"a generated workload {trace} has blocks of {size} tokens; leave --block-size out")
        count = limit or GENERATED_REQUESTS
        made = (
            generate_agents(requests=count, seed=seed, rate=rate)
            if trace == agents.NAME
            else generate(trace, count, seed=seed, rate=rate)
        )
        return Trace([work_of(line, size) for line in made], size, "trace")
    if rate is not None:
        raise BadRequest("--rate is for generated workloads; a trace has its own times, see --speedup")
    within(block_size, "block-size", 1, MOST_BLOCK_SIZE)
    if os.path.isdir(trace):  # noqa: PTH112 - for a name that is too long as well
        found = read_sessions(Path(trace), block_size=block_size, limit=limit, progress=progress)
        return Trace(_spread(found.work, seed), found.block_size, found.source)
    try:
        found = read_trace(Path(trace), block_size=block_size, limit=limit, progress=progress)
    except BadTrace as error:
        if os.path.exists(trace):  # noqa: PTH110 - for a name that is too long as well
            raise
        raise BadTrace(f"{error}; without a trace, simulate one of {', '.join(WORKLOADS)}") from None
    # Traces may have times of the day; a simulation begins with its first request.
    begin = min(request.arrival for request in found.work)
    work = [msgspec.structs.replace(request, arrival=request.arrival - begin) for request in found.work]
    return Trace(work, found.block_size, found.source)


def _spread(work: Sequence[Work], seed: int) -> list[Work]:
    """Sessions that say nothing of when they begin, at random within `SPREAD_SECONDS`."""
    rng = random.Random(seed)  # noqa: S311 - a repeatable workload, no secret
    begins: dict[str, float] = {}
    for request in work:
        if request.session not in begins:
            begins[request.session] = begins[request.parent] if request.parent else rng.uniform(0, SPREAD_SECONDS)
    return [msgspec.structs.replace(request, arrival=begins[request.session]) for request in work]


def changes(given: Sequence[str], option: str, *, joins: bool) -> list[Change]:
    """Read `node@seconds`. Raises `BadRequest`."""
    found = []
    for text in given:
        node, at, time = text.partition("@")
        try:
            if not at or not node or not 0 <= float(time) < float("inf"):
                raise ValueError(text)  # noqa: TRY301
            found.append(Change(float(time), node, joins))
        except ValueError:
            raise BadRequest(f"--{option} is {text!r}; write a node and seconds, as in node-3@60") from None
    return found


def check_changes(settings: Settings) -> None:
    """Raise `BadRequest` unless only nodes that are there fail, and only nodes that are not there join."""
    there = {f"node-{number + 1}" for number in range(settings.nodes)}
    for change in sorted(settings.changes, key=lambda change: change.time):
        check_name(change.node, "a node's name")
        if change.joins and change.node in there:
            raise BadRequest(f"--join names {change.node!r}, which is there at {change.time:g} s already")
        if not change.joins and change.node not in there:
            raise BadRequest(
                f"--fail names {change.node!r}, which is not there at {change.time:g} s; the nodes are node-1 to "
                f"node-{settings.nodes}, and those that join"
            )
        there ^= {change.node}
