"""The order of the demonstration, what it prints, and its result."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from msgspec import Struct, field
from msgspec.structs import replace
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvplane.events import types
from kvplane.events.errors import KvplaneError
from kvplane.events.hashing import block_hashes
from kvplane.events.log.connection import connected
from kvplane.services.demo.features import FEATURES
from kvplane.services.demo.fleet import Fleet
from kvplane.services.demo.gateway import one_url
from kvplane.services.demo.history import STEPS
from kvplane.services.demo.stage import Stage, brief, check
from kvplane.services.demo.traffic import Traffic
from kvplane.services.demo.workload import conversations, round_robin_hit_rate
from kvplane.services.embedded.server import free_port, holding, reached_at
from kvplane.services.process.terminal import printable
from kvplane.services.protocol import messages
from kvplane.services.simulation.trace import Work, read_trace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MODEL = "demo/chat-8b"
NODES = ("node-a", "node-b", "node-c", "node-d")
CONCURRENCY = 24
EVERY_STEP_HELD = "every step held"
REAL_PREFILL = 8000.0
"""Prefill speed that the policy's defaults fit, in tokens per second; the demonstration runs faster by one factor."""


class Options(Struct, frozen=True, kw_only=True):
    """What the demonstration runs with."""

    trace: Path | None = None
    limit: int = 2000
    keep: Path | None = None


class Scale(Struct, frozen=True):
    """Sizes of the simulated nodes."""

    block_size: int
    capacity_blocks: int
    prefill_speed: float
    decode_speed: float


CHAT = Scale(block_size=16, capacity_blocks=4096, prefill_speed=200_000, decode_speed=4_000)
TRACE = Scale(block_size=512, capacity_blocks=4096, prefill_speed=4_000_000, decode_speed=100_000)
"""For a trace, whose own block size is taken with as many tokens."""


class StepResult(Struct):
    """One line of the demonstration."""

    step: str
    held: bool
    message: str = field(name="said")


class Result(Struct):
    """What the demonstration found. Rates are shares of prompt tokens, times are seconds."""

    held: bool = False
    steps: list[StepResult] = []
    requests: int = 0
    exact: int = 0
    prefix: int = 0
    miss: int = 0
    retries: int = 0
    failed: int = 0
    hit_rate: float = 0.0
    predicted_hit_rate: float = 0.0
    round_robin_hit_rate: float = 0.0
    node_loss_seconds: float = 0.0
    router_recovery_seconds: float = 0.0
    full_recovery_seconds: float = 0.0
    digests_equal: bool = False
    commits: int = 0
    seconds: float = 0.0


class Demo:
    """One run. Everything that it prints goes to standard error."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.scale = TRACE if options.trace else CHAT
        self.console = Console(stderr=True, highlight=False)
        self.result = Result(steps=[])

    async def run(self) -> Result:
        """Run all steps; the result says whether each of them held."""
        began = time.monotonic()
        work = self._work()
        with tempfile.TemporaryDirectory(prefix="kvplane-demo-") as temporary:
            folder = self.options.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            port = free_port()
            async with holding(folder / "data", reached_at("127.0.0.1", port), "kvplane demo") as owner:
                fleet = Fleet(folder, port, "demo", owner)
                try:
                    await self._run_on(fleet, work)
                finally:
                    await fleet.stop()
        self.result.seconds = time.monotonic() - began
        self.result.held = bool(self.result.steps) and all(step.held for step in self.result.steps)
        return self.result

    def _work(self) -> list[Work]:
        """The requests, from the trace if there is one; the nodes are made for its blocks."""
        if self.options.trace is None:
            return conversations()
        trace = read_trace(self.options.trace, limit=self.options.limit)
        tokens = TRACE.capacity_blocks * TRACE.block_size
        self.scale = replace(TRACE, block_size=trace.block_size, capacity_blocks=tokens // trace.block_size)
        return trace.work

    async def _run_on(self, fleet: Fleet, work: list[Work]) -> None:
        if not await self._step("start", lambda: self._start(fleet)):
            return
        async with connected([fleet.url], "kvplane-demo") as client:
            traffic = Traffic(client, fleet.name, MODEL)
            stage = Stage(client, fleet, traffic, self.scale.block_size)
            async with anyio.create_task_group() as group:
                group.start_soon(stage.follower.run)
                await stage.follower.caught_up.wait()
                if await self._step("nodes join", lambda: self._join(stage)):
                    await self._step("one URL", lambda: one_url(stage))
                    for name, feature in FEATURES:
                        await self._step(name, lambda feature=feature: feature(stage))  # type: ignore[misc]
                    stage.traffic = Traffic(client, fleet.name, MODEL)
                    await self._step("traffic, with a node and both routers killed", lambda: self._traffic(stage, work))
                    await self._step("kill -9 of server, routers and coordinator", lambda: self._recover(stage))
                    for name, step in STEPS:
                        await self._step(name, lambda step=step: step(stage))  # type: ignore[misc]
                group.cancel_scope.cancel()
            self._count(stage, work)
            if stage.traffic.totals.requests:
                await self._step("better than round-robin", self._compare)

    async def _step(self, name: str, step: Callable[[], Awaitable[str]]) -> bool:
        """Run a step and print what it says; whether it held."""
        try:
            message, held = await step(), True
        except (KvplaneError, TimeoutError) as error:
            message, held = str(error) or type(error).__name__, False
        except BaseExceptionGroup as errors:
            known, others = errors.split(KvplaneError)
            if others is not None or known is None:
                raise
            message, held = "; ".join(sorted({str(error) for error in known.exceptions})), False
        self.result.steps.append(StepResult(name, held, message))
        self.console.print(shown(self.result.steps[-1]))
        return held

    async def _start(self, fleet: Fleet) -> str:
        await fleet.start_server()
        await fleet.start("coordinator", "coordinator")
        async with connected([fleet.url], "kvplane-demo") as client:
            await fleet.coordinators(client, 1)
            for name in ("router-1", "router-2"):
                await fleet.start(name, "router")
            scale = self.scale
            simnode = [
                "--model", MODEL, "--block-size", str(scale.block_size), "--capacity-blocks", str(scale.capacity_blocks),
                "--prefill-speed", str(scale.prefill_speed), "--decode-speed", str(scale.decode_speed),
            ]  # fmt: skip
            await fleet.start("managed", "simnode", NODES[0], "--cache-mode", "managed", *simnode)
            await fleet.start("reported", "simnode", *NODES[1:3], *simnode)
            await fleet.start("doomed", "simnode", NODES[3], *simnode)
            await self._start_historian(fleet)
            await fleet.routers(client, 2)
        return f"server, coordinator, two routers, a historian and {len(NODES)} nodes, logs in {fleet.folder}"

    @staticmethod
    async def _start_historian(fleet: Fleet) -> None:
        await fleet.start("historian", "historian", "--history", str(fleet.folder / "history"))

    async def _join(self, stage: Stage) -> str:
        for node in NODES:
            await stage.seen(types.NodeRegistered, lambda event, node=node: event.node == node, seconds=20)  # type: ignore[misc]
        factor = self.scale.prefill_speed / REAL_PREFILL
        policy = messages.PolicyRequest(
            policy="ttft",
            parameters={
                "active_seconds": 0.002 / factor,
                "decode_seconds": 0.002 / factor,
                "session_seconds": 0.5 / factor,
            },
        )
        await stage.command("policy.set", policy)
        at, event = await stage.seen(types.PolicyChanged)
        await anyio.sleep(0.2)
        return f"{', '.join(NODES)} are registered; the policy fits their speed since {at}: {brief(event)}"

    async def _traffic(self, stage: Stage, work: list[Work]) -> str:
        """All requests, with a node killed after a third and both routers after two thirds of them."""
        done = 0
        third, two_thirds = anyio.Event(), anyio.Event()
        columns = (
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[hit]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("requests", total=len(work), hit="")

            def advance() -> None:
                nonlocal done
                done += 1
                progress.update(task, completed=done, hit=f"{stage.traffic.totals.hit_rate:.1%} of tokens cached")
                if done >= len(work) // 3:
                    third.set()
                if done >= 2 * len(work) // 3:
                    two_thirds.set()

            async with anyio.create_task_group() as group:
                group.start_soon(self._kill_node, stage, third)
                group.start_soon(self._kill_routers, stage, two_thirds)
                group.start_soon(lambda: stage.traffic.run(work, concurrency=CONCURRENCY, progress=advance))
        totals = stage.traffic.totals
        check(totals.requests == len(work), f"{totals.requests} of {len(work)} requests succeeded")
        return (
            f"all {totals.requests:,} requests were answered, {totals.retries} sent again; {NODES[3]} was concluded lost "
            f"after {self.result.node_loss_seconds:.1f} s, routers were back after {self.result.router_recovery_seconds:.1f} s"
        )

    async def _kill_node(self, stage: Stage, when: anyio.Event) -> None:
        await when.wait()
        began, after = time.monotonic(), stage.state.sequence
        await stage.fleet.kill("doomed")
        await stage.seen(types.NodeLost, lambda event: event.node == NODES[3], after=after, seconds=20)
        self.result.node_loss_seconds = time.monotonic() - began
        node = stage.state.nodes[NODES[3]]
        check(stage.state.caches.held(node) == 0, "blocks of the lost node are still in the index")
        check(stage.state.sessions.on_node(node.name) == 0, "sessions are still on the lost node")

    async def _kill_routers(self, stage: Stage, when: anyio.Event) -> None:
        await when.wait()
        began = time.monotonic()
        await stage.fleet.kill("router-1", "router-2", "historian")
        await self._start_historian(stage.fleet)
        for name in ("router-1", "router-2"):
            await stage.fleet.start(name, "router")
        await stage.fleet.routers(stage.client, 1)
        self.result.router_recovery_seconds = time.monotonic() - began
        await stage.fleet.routers(stage.client, 2)

    async def _recover(self, stage: Stage) -> str:
        """Everything but the engines is killed; what comes back knows what it knew."""
        work = unseen_prompt(self.scale.block_size)
        await stage.traffic.send(work)
        await anyio.sleep(0.3)
        before = await stage.statuses()
        check(len({status.digest for status in before}) == 1, "routers and coordinator have different digests")
        sequence, digest = before[0].sequence, str(before[0].digest)
        began = time.monotonic()
        await stage.fleet.kill("server", "coordinator", "router-1", "router-2", "historian")
        await stage.fleet.start_server()
        await stage.fleet.start("coordinator", "coordinator")
        await stage.fleet.start("router-1", "router")
        await stage.fleet.start("router-2", "router")
        await self._start_historian(stage.fleet)
        await stage.fleet.routers(stage.client, 1)
        answer, again = await stage.traffic.send(work)
        self.result.full_recovery_seconds = time.monotonic() - began
        rebuilt = await stage.digest_at(sequence)
        after = await stage.statuses()
        self.result.digests_equal = rebuilt == digest and len({status.digest for status in after}) == 1
        self.result.commits = after[0].commits
        check(rebuilt == digest, f"the digest at {sequence} was {digest} and is {rebuilt}")
        check(self.result.digests_equal, "routers and coordinator came back with different digests")
        check(answer.kind == "exact", f"the next request was {answer.kind}")
        check(again.cached_tokens == answer.matched_tokens, "the next request was not cached as predicted")
        check(after[0].nodes == before[0].nodes, "nodes are missing")
        return (
            f"digest {digest[:12]} at sequence {sequence} before and after, nodes and sessions as they were, and the next "
            f"request was {answer.kind} on {answer.node} after {self.result.full_recovery_seconds:.1f} s"
        )

    def _count(self, stage: Stage, work: list[Work]) -> None:
        totals, result = stage.traffic.totals, self.result
        for name in ("requests", "exact", "prefix", "miss", "retries", "failed", "hit_rate"):
            setattr(result, name, getattr(totals, name))
        result.predicted_hit_rate = totals.predicted_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
        result.round_robin_hit_rate = round_robin_hit_rate(
            work, nodes=len(NODES), capacity_blocks=self.scale.capacity_blocks, block_size=self.scale.block_size
        )

    async def _compare(self) -> str:
        result = self.result
        message = f"{result.hit_rate:.1%} of the prompt tokens were cached, {result.round_robin_hit_rate:.1%} with round-robin"
        check(result.hit_rate > result.round_robin_hit_rate, message)
        return message

    def figures(self) -> list[tuple[str, str]]:
        """The result as pairs of a name and a value."""
        result = self.result
        return [
            ("requests", f"{result.requests:,}"),
            ("exact / prefix / miss", f"{result.exact:,} / {result.prefix:,} / {result.miss:,}"),
            ("sent again / failed", f"{result.retries} / {result.failed}"),
            ("hit rate in tokens", f"{result.hit_rate:.1%}"),
            ("the same, predicted by the routers", f"{result.predicted_hit_rate:.1%}"),
            ("the same, round-robin", f"{result.round_robin_hit_rate:.1%}"),
            ("node lost after", f"{result.node_loss_seconds:.1f} s"),
            ("routers back after", f"{result.router_recovery_seconds:.1f} s"),
            ("everything back after", f"{result.full_recovery_seconds:.1f} s"),
            ("digests equal", "yes" if result.digests_equal else "NO"),
            ("commits on the log", f"{result.commits:,}"),
            ("took", f"{result.seconds:.0f} s"),
        ]


def shown(step: StepResult) -> Table:
    """A step as it is printed: whether it held, its name, and what it says, with later lines under the first."""
    line = Table.grid(padding=(0, 1))
    mark = "[green]held[/]" if step.held else "[bold red]FAILED[/]"
    line.add_column(width=6)
    line.add_column()
    line.add_row(mark, f"[bold]{escape(step.step)}[/]: {escape(printable(step.message, lines=True))}")
    return line


def unseen_prompt(block_size: int) -> Work:
    """A prompt of 16 blocks that nobody has sent before."""
    count = 16 * block_size
    return Work(block_hashes(range(40_000, 40_000 + count), block_size), count + 1, 1)
