"""The report on policies: every policy on every trace, at several loads, with several numbers of nodes and caches.

The knee of a cell is the highest load at which `ttft` keeps the p99 of TTFT under `KNEE_SECONDS`; light load is half of
it, overload a quarter more. Nothing in a report depends on the machine or on how many processes made it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from kvplane.events.hashing import pack_hashes
from kvplane.services.process.workers import workers
from kvplane.services.protocol.errors import PolicyFailed
from kvplane.services.routing.policies import POLICIES
from kvplane.services.simulation.bound import Bound, bound
from kvplane.services.simulation.closed import CHAT, FURTHER, PLACES, Kind, LoopPlan, LoopReport, given, produce_loops
from kvplane.services.simulation.compare import parse_choice, run
from kvplane.services.simulation.paced import SITUATIONS
from kvplane.services.simulation.peer import POLICY as PEER
from kvplane.services.simulation.peer import Selector
from kvplane.services.simulation.results import Summary, ideal_hit_rate, summarize
from kvplane.services.simulation.trace import Work, read_trace, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, KINDS, generate
from kvplane.services.simulation.world import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SEED = 1
NODES = (4, 8, 16)
REQUESTS_A_NODE = 250
CACHES = {"small": 420_000, "large": 3_000_000}
"""Tokens a node: what is left of the GPU's memory, and that with some 400 GB of the host's."""
LOADS = {"light": 0.5, "knee": 1.0, "overload": 1.25}
KNEE_SECONDS = 10.0
HALVINGS = 4
"""How often the interval of the knee is halved, on a scale of powers of two: to 4 %."""
DELAYS = (0.0, 0.05, 0.5)
ROUTERS = (1, 2, 4)
BURST = 50
BURST_NODES = 16
BURST_TOKENS = 8000


class Plan(Struct, frozen=True, kw_only=True):
    """What a report measures."""

    traces: tuple[str, ...]
    """Paths, or generated kinds."""
    policies: tuple[str, ...] = ()
    """Policies that are judged beside the built-in ones."""
    built_in: tuple[str, ...] = tuple(POLICIES)
    peer: bool = False
    """Whether the peer's selector is judged as well; its package must be installed."""
    nodes: tuple[int, ...] = NODES
    caches: dict[str, int] = field(default_factory=CACHES.copy)
    """Tokens a node."""
    loads: dict[str, float] = field(default_factory=LOADS.copy)
    """Multiples of the knee."""
    delays: tuple[float, ...] = DELAYS
    """Seconds until a router sees a commit."""
    routers: tuple[int, ...] = ROUTERS
    agents: str = ""
    """Path of a closed loop of agents, of which each half is judged; without one, only generated ones are."""
    places: dict[Kind, tuple[tuple[int, int], ...]] = field(default_factory=PLACES.copy)
    """Nodes and seeds of each kind of closed loop."""
    situations: tuple[str, ...] = tuple(SITUATIONS)
    """Of paced sessions."""
    knee: float | None = None
    """A speedup that counts as the knee of every cell; without one it is looked for."""

    @property
    def judged(self) -> tuple[str, ...]:
        """All policies, each once."""
        return tuple(dict.fromkeys([*self.built_in, *self.policies]))

    @property
    def closed(self) -> LoopPlan:
        """The closed loops."""
        return LoopPlan(
            policies=self.judged, agents=self.agents, peer=self.peer, places=self.places, situations=self.situations
        )  # fmt: skip

    @property
    def cells(self) -> list[Cell]:
        """All cells."""
        return [Cell(trace, nodes, cache) for trace in self.traces for nodes in self.nodes for cache in self.caches]

    @property
    def steps(self) -> int:
        """How many steps `produce` reports."""
        each = len(self.nodes) * len(self.caches)
        return len(self.traces) * (
            each
            + each * len(self.loads) * (len(self.judged) + 1)
            + len(self.delays) * len(self.routers)
            + (len(self.caches) if self.peer else 0)
        ) + self.closed.steps  # fmt: skip


class Cell(Struct, frozen=True, order=True):
    """Where policies are compared: a trace (a path or a generated kind), nodes, and one of the plan's caches."""

    trace: str
    nodes: int
    cache: str

    @property
    def name(self) -> str:
        """The trace's name, without its folder."""
        return Path(self.trace).stem


class Job(Struct, frozen=True):
    """One run."""

    cell: Cell
    policy: str
    speedup: float
    delay: float = 0.002
    routers: int = 1


class Report(Struct):
    """All runs of a report. `knees` are speedups; `peer` is empty where the peer was not judged."""

    plan: Plan
    knees: dict[Cell, float]
    runs: dict[tuple[Cell, str, str], Summary]
    overlay: dict[tuple[str, float, int], Summary]
    peer: dict[Cell, Summary]
    burst: dict[tuple[float, int], tuple[int, int, float, float]]
    """By delay and routers: nodes that got a request, most requests on one, mean and largest TTFT."""
    bounds: dict[tuple[Cell, str], Bound] = {}
    """By cell and load."""
    loops: LoopReport = field(default_factory=LoopReport)


@lru_cache(maxsize=4)
def load(trace: str, count: int) -> tuple[list[Work], int, float]:
    """Requests, block size and ideal hit rate of a trace."""
    if trace in KINDS:
        work = [work_of(line, GENERATED_BLOCK_SIZE) for line in generate(trace, count, seed=SEED)]
        size = GENERATED_BLOCK_SIZE
    else:
        found = read_trace(Path(trace), limit=count)
        work, size = found.work, found.block_size
    return work, size, ideal_hit_rate(work, size)


def make(plan: Plan, job: Job) -> Summary:
    """Make one run. Raises `PolicyFailed` when the policy failed in every decision of it."""
    work, size, ideal = load(job.cell.trace, job.cell.nodes * REQUESTS_A_NODE)
    settings = _settings(plan, job, size)
    summary = summarize(run(settings, work), job.policy, ideal)
    if summary.failed:
        raise PolicyFailed(f"policy {job.policy} failed in all of its decisions: {' '.join(summary.failure.split())}")
    return summary


def _settings(plan: Plan, job: Job, size: int) -> Settings:
    choice = parse_choice(job.policy)
    return Settings(
        nodes=job.cell.nodes, capacity=plan.caches[job.cell.cache] // size, block_size=size, policy=choice.policy,
        parameters=choice.parameters, speedup=job.speedup, seed=SEED, delay=job.delay, routers=job.routers,
    )  # fmt: skip


def bounded(plan: Plan, job: Job) -> Bound:
    """What nobody can do better than in a run."""
    work, size, _ = load(job.cell.trace, job.cell.nodes * REQUESTS_A_NODE)
    return bound(_settings(plan, job, size), work)


def knee(plan: Plan, cell: Cell) -> float:
    """The highest speedup at which `ttft` keeps its p99 under `KNEE_SECONDS`, unless the plan has one."""
    if plan.knee is not None:
        return plan.knee

    def holds(power: float) -> bool:
        return make(plan, Job(cell, "ttft", 2.0**power)).p99 < KNEE_SECONDS

    low = 0.0
    if holds(low):
        while holds(low + 1):
            low += 1
    else:
        while not holds(low):
            low -= 1
    step = 0.5
    for _ in range(HALVINGS):
        if holds(low + step):
            low += step
        step /= 2
    return float(2.0**low)


def burst(delay: float, routers: int) -> tuple[int, int, float, float]:
    """Requests with one new prefix, one a millisecond, on idle nodes."""
    size = GENERATED_BLOCK_SIZE
    prefix = range(1, BURST_TOKENS // size + 1)
    work = [
        Work(
            pack_hashes([*prefix, *range(10_000 + 4 * at, 10_003 + 4 * at)]), BURST_TOKENS + 200, 100, "", 1 + at / 1000
        )
        for at in range(BURST)
    ]
    settings = Settings(
        nodes=BURST_NODES, capacity=CACHES["large"] // size, block_size=size, seed=SEED, delay=delay, routers=routers
    )
    served = run(settings, work).served
    counts = [sum(one.node == node for one in served) for node in range(BURST_NODES)]
    times = [one.first - one.arrival for one in served]
    return sum(count > 0 for count in counts), max(counts), sum(times) / len(times), max(times)


def produce(plan: Plan, *, processes: int, progress: Callable[[], None] = lambda: None) -> Report:
    """Make a whole report; `progress` is called after each run.

    Raises `BadTrace`, `BadRequest` for a policy that is none or without the peer, and `PolicyFailed`.
    """
    report = Report(plan, {}, {}, {}, {}, {})
    # What can't be run is an error before the work begins.
    for policy in (*plan.policies, *FURTHER):
        parse_choice(policy)
    if plan.peer:
        Selector().close()
    for trace in plan.traces:
        load(trace, 1)
    if plan.agents:
        given(plan.agents)
    everywhere = plan.cells
    with workers(processes) as submit:

        def results(function: Callable[..., Any], arguments: Sequence[Any], *first: Plan) -> Iterator[Any]:
            jobs = [submit(function, *first, argument) for argument in arguments]
            for job in jobs:
                yield job.result()
                progress()

        report.knees.update(zip(everywhere, results(knee, everywhere, plan), strict=True))
        keys = [(cell, name, policy) for cell in everywhere for name in plan.loads for policy in plan.judged]
        jobs = [Job(cell, policy, report.knees[cell] * plan.loads[name]) for cell, name, policy in keys]
        report.runs.update(zip(keys, results(make, jobs, plan), strict=True))
        loaded = [(cell, name) for cell in everywhere for name in plan.loads]
        jobs = [Job(cell, "ttft", report.knees[cell] * plan.loads[name]) for cell, name in loaded]
        report.bounds.update(zip(loaded, results(bounded, jobs, plan), strict=True))
        overlaid = [
            (trace, delay, routers) for trace in plan.traces for delay in plan.delays for routers in plan.routers
        ]
        jobs = [
            Job(Cell(trace, 8, "large"), "ttft", report.knees[Cell(trace, 8, "large")], delay, routers)
            for trace, delay, routers in overlaid
        ]
        report.overlay.update(zip(overlaid, results(make, jobs, plan), strict=True))
        judged = [Cell(trace, 8, cache) for trace in plan.traces for cache in plan.caches] if plan.peer else []
        jobs = [Job(cell, PEER, report.knees[cell]) for cell in judged]
        report.peer.update(zip(judged, results(make, jobs, plan), strict=True))
        knees = {cell.nodes: at for cell, at in report.knees.items() if (cell.trace, cell.cache) == (CHAT, "large")}
        report.loops = produce_loops(plan.closed, knees, results)
    report.burst = {(delay, routers): burst(delay, routers) for delay in plan.delays for routers in plan.routers}
    return report


def pairs(report: Report, load_name: str | None = None) -> Iterator[tuple[Cell, str, Summary, dict[str, Summary]]]:
    """Each cell and load, with the run of `ttft` and those of the others."""
    for cell in report.knees:
        for name in report.plan.loads:
            if load_name in {None, name}:
                others = {policy: report.runs[cell, name, policy] for policy in report.plan.judged if policy != "ttft"}
                yield cell, name, report.runs[cell, name, "ttft"], others
