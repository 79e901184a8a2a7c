"""The closed-loop part of the report: sessions that wait for their answers, on fleets of which the smallest is too small.

Given agents are taken by halves, since constants were chosen on the first. Families of sessions are dealt in turn: sessions,
those that name them as their parent, and those whose name begins with the same number. Each half comes several times, with
blocks of its own, begun at random within `SPAN_SECONDS`. Generated agents are another load, and people who chat (`multi-turn`),
who begin as often as at the open loop's knee.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.services.protocol.errors import BadTrace, PolicyFailed
from kvplane.services.simulation import foresight
from kvplane.services.simulation.agents import DEFAULT, generate_agents
from kvplane.services.simulation.bound import Bound, bound
from kvplane.services.simulation.compare import parse_choice, run
from kvplane.services.simulation.paced import MINDFUL, SITUATIONS, serve_paced
from kvplane.services.simulation.peer import POLICY as PEER
from kvplane.services.simulation.results import Summary, ideal_hit_rate, summarize
from kvplane.services.simulation.trace import Work, read_trace, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, TOKEN_SECONDS, generate
from kvplane.services.simulation.world import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvplane.services.simulation.trace import TraceRequest


Kind = Literal["second", "first", "generated", "multi-turn"]
"""Half of given agents, or what is generated."""
HALVES = ("second", "first")
CHAT: Literal["multi-turn"] = "multi-turn"
FURTHER: tuple[str, ...] = ("ttft:hold=1",)
"""Policies that are judged in closed loops only, as in `ttft:hold=1`."""
CAPACITY = 3_000_000
"""Tokens that a node keeps."""
COPIES = 4
SPAN_SECONDS = 1800.0
SESSIONS = 200
"""Generated agents, their sub-agents not counted."""
CHAT_REQUESTS_A_NODE = 750
"""Of `multi-turn`: enough for its sessions to come and go."""
PLACES: dict[Kind, tuple[tuple[int, int], ...]] = {
    "second": ((4, 1), (8, 1), (8, 2), (16, 1)), "first": ((4, 1), (8, 1)), "generated": ((4, 1), (8, 1)),
    CHAT: ((8, 1),),
}  # fmt: skip
"""Nodes and seeds of each kind of load: as many as some ten minutes have room for."""
BLIND = ("round_robin", "least_loaded")
"""Policies that ask neither for caches nor for sessions: the worst of all here, so one seed of the second half shows it."""
PEER_PLACES = (("second", 8, 1), ("second", 16, 1), (CHAT, 8, 1))
"""Where Dynamo's selector is judged: a run of it takes as long as five of others."""
ALONE = (0.0, 1)
ROUTED = (0.05, 4)
"""Delay in seconds and routers of the runs that show what several routers cost."""
ROUTED_NODES = 8
_COPY_BITS = 45


class Loop(Struct, frozen=True, order=True):
    """Where policies are compared: sessions, nodes, and a seed that decides when sessions begin, and ties."""

    kind: Kind
    nodes: int
    seed: int = 1
    trace: str = ""
    """Path of the given agents."""
    speedup: float = 1.0
    """How many times closer than generated sessions begin."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        names = {
            "first": "first half",
            "second": "second half",
            "generated": "generated agents",
            "multi-turn": "multi-turn",
        }
        return f"{Path(self.trace).stem}, {names[self.kind]}" if self.trace else names[self.kind]


class LoopJob(Struct, frozen=True, order=True):
    """One run; of `foresight.NAME` it is the schedule of who knows the trace."""

    loop: Loop
    policy: str
    delay: float = 0.002
    routers: int = 1


class LoopPlan(Struct, frozen=True, kw_only=True):
    """What the closed loops of a report are."""

    policies: tuple[str, ...]
    agents: str = ""
    """Path of a closed loop of agents, of which each half is judged; without one, only generated ones are."""
    peer: bool = False
    places: dict[Kind, tuple[tuple[int, int], ...]] = field(default_factory=PLACES.copy)
    """Nodes and seeds of each kind of load."""
    situations: tuple[str, ...] = tuple(SITUATIONS)
    """Of `paced`."""

    def loops(self, knees: Mapping[int, float]) -> list[Loop]:
        """All loads; sessions of chats begin as often as at the knee for so many nodes."""
        return [
            Loop(
                kind, nodes, seed, self.agents if kind in HALVES else "",
                knees.get(nodes, 1.0) if kind == CHAT else 1.0,
            )
            for kind, where in self.places.items()
            if self.agents or kind not in HALVES
            for nodes, seed in where
        ]  # fmt: skip

    def judged(self, loop: Loop) -> list[str]:
        """The policies that are run on a load."""
        chosen = [*self.policies, *FURTHER, foresight.NAME]
        if loop.kind == "first" or loop.seed != 1:
            chosen = [policy for policy in chosen if policy not in BLIND]
        if self.peer and (loop.kind, loop.nodes, loop.seed) in PEER_PLACES:
            chosen.append(PEER)
        return list(dict.fromkeys(chosen))

    def routed(self, loops: Iterable[Loop]) -> list[LoopJob]:
        """Runs that show what several routers cost: each load once with one router and no delay, and once with several."""
        chosen = [loop for loop in loops if loop.nodes == ROUTED_NODES and loop.kind != "first" and loop.seed == 1]
        return [LoopJob(loop, "ttft", *how) for loop in chosen for how in (ALONE, ROUTED)]

    @property
    def paced(self) -> list[tuple[str, str]]:
        """Situations and policies of `paced`."""
        return [
            (name, policy)
            for name in self.situations
            for policy in self.policies
            if policy.partition(":")[0] in MINDFUL
        ]

    @property
    def steps(self) -> int:
        """How many steps `produce_loops` reports."""
        found = self.loops({})
        return sum(1 + len(self.judged(loop)) for loop in found) + len(self.routed(found)) + len(self.paced)


class LoopReport(Struct):
    """All runs in closed loops, and those of paced sessions."""

    bounds: dict[Loop, Bound] = {}
    runs: dict[tuple[Loop, str], Summary] = {}
    routed: dict[LoopJob, Summary] = {}
    paced: dict[tuple[str, str], Summary] = {}


def produce_loops(
    plan: LoopPlan, knees: Mapping[int, float], results: Callable[[Callable[..., Any], Sequence[Any]], Iterable[Any]]
) -> LoopReport:
    """Make all runs; `results` calls a function with each argument, in whatever process."""
    loops = plan.loops(knees)
    report = LoopReport()
    report.bounds.update(zip(loops, results(bounded, loops), strict=True))
    jobs = [LoopJob(loop, policy) for loop in loops for policy in plan.judged(loop)]
    report.runs.update(zip(((job.loop, job.policy) for job in jobs), results(serve, jobs), strict=True))
    routed = plan.routed(loops)
    report.routed.update(zip(routed, results(serve, routed), strict=True))
    report.paced.update(zip(plan.paced, results(_paced, plan.paced), strict=True))
    return report


def _paced(which: tuple[str, str]) -> Summary:
    return serve_paced(*which)


def halves(work: Sequence[Work]) -> tuple[list[list[Work]], list[list[Work]]]:
    """The families of a trace, dealt in turn; of each its requests in order."""
    parents = {request.session: request.parent for request in work if request.parent}
    families: dict[str, list[Work]] = {}
    for request in work:
        root = request.session
        while root in parents:
            root = parents[root]
        number = re.match(r"\d+", root)
        families.setdefault(number[0] if number else root, []).append(request)
    # Numbers in their order.
    ordered = [families[name] for name in sorted(families, key=lambda name: (len(name), name))]
    return ordered[::2], ordered[1::2]


def copies(families: Sequence[Sequence[Work]], seed: int) -> list[Work]:
    """All families `COPIES` times, each with blocks of its own, begun at random."""
    rng = random.Random(seed)  # noqa: S311 - a repeatable workload, no secret
    made = []
    for copy in range(COPIES):
        for family in families:
            begin = rng.uniform(0, SPAN_SECONDS)
            earliest = min(request.arrival for request in family)
            for request in family:
                hashes = request.hashes
                if copy:
                    hashes = pack_hashes([block + (copy << _COPY_BITS) for block in unpack_hashes(hashes)])
                # Only the order counts of the times of what waits for an answer.
                made.append(
                    replace(
                        request, hashes=hashes, session=f"{copy}.{request.session}", arrival=begin + request.arrival - earliest,
                        parent=f"{copy}.{request.parent}" if request.parent else "",
                    )
                )  # fmt: skip
    return made


def chats(lines: Sequence[TraceRequest]) -> list[Work]:
    """An open loop as a closed one: pauses are those between an answer on an idle node and the next request."""
    made = []
    last: dict[str, TraceRequest] = {}
    for line in lines:
        before = last.get(line.session)
        last[line.session] = line
        delay = None
        if before is not None:
            answered = (before.timestamp or 0.0) / 1000 + before.output_length * TOKEN_SECONDS
            delay = max(0.0, (line.timestamp or 0.0) / 1000 - answered)
        made.append(replace(work_of(line, GENERATED_BLOCK_SIZE), delay=delay))
    return made


@lru_cache(maxsize=2)
def given(path: str) -> tuple[list[Work], int]:
    """The requests of a closed loop, and its block size. Raises `BadTrace`."""
    trace = read_trace(Path(path))
    if any(not request.session for request in trace.work) or all(request.delay is None for request in trace.work):
        raise BadTrace(f"{Path(path).name} is no closed loop: its lines need a session and a delay; see docs/traces.md")
    return trace.work, trace.block_size


@lru_cache(maxsize=2)
def load(loop: Loop) -> tuple[list[Work], int, float]:
    """Requests, block size and ideal hit rate. Raises `BadTrace`."""
    if loop.kind == "generated":
        profile = replace(DEFAULT, rate=SESSIONS / SPAN_SECONDS)
        made = generate_agents(profile, sessions=SESSIONS, seed=loop.seed)
        work, size = [work_of(line, profile.block_size) for line in made], profile.block_size
    elif loop.kind == CHAT:
        count = loop.nodes * CHAT_REQUESTS_A_NODE
        work, size = chats(generate(CHAT, count, seed=loop.seed)), GENERATED_BLOCK_SIZE
    else:
        work, size = given(loop.trace)
        work = copies(halves(work)[loop.kind == "second"], loop.seed)
    return work, size, ideal_hit_rate(work, size)


def settings_of(job: LoopJob, block_size: int) -> Settings:
    """The fleet of a run. Raises `BadRequest` for a policy that is none."""
    known = job.policy == foresight.NAME
    choice = parse_choice("ttft" if known else job.policy)
    return Settings(
        nodes=job.loop.nodes, capacity=CAPACITY // block_size, block_size=block_size, policy=choice.policy,
        parameters=choice.parameters, speedup=job.loop.speedup, seed=job.loop.seed, delay=job.delay, routers=job.routers,
    )  # fmt: skip


def serve(job: LoopJob) -> Summary:
    """Make one run. Raises `PolicyFailed` when the policy failed in every decision of it."""
    work, size, ideal = load(job.loop)
    settings = settings_of(job, size)
    known = job.policy == foresight.NAME
    outcome = foresight.best(settings, work) if known else run(settings, work)
    summary = summarize(outcome, job.policy, ideal)
    if summary.failed:
        raise PolicyFailed(f"policy {job.policy} failed in all of its decisions: {' '.join(summary.failure.split())}")
    return summary


def bounded(loop: Loop) -> Bound:
    """What nobody can do better."""
    work, size, _ = load(loop)
    return bound(settings_of(LoopJob(loop, "ttft"), size), work)
