"""What the benchmarks share: rows of the table, medians, and worker processes that are pinned to one core.

Workers speak lines of JSON: one command in, one answer out. Two workers on one core that are asked in turn see the same
machine, whatever else runs there; so ratios inside one run mean something where times alone don't.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import structlog
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent


class Row(Struct, kw_only=True, omit_defaults=True):
    """One line of the table. `ratio` is measured divided by `other`; `other` is what `beside` names, in the same unit."""

    name: str
    measured: float
    unit: str
    target: str = ""
    held: bool | None = None
    beside: str = ""
    other: float | None = None
    ratio: float | None = None
    note: str = ""


class Limit(Struct, frozen=True, kw_only=True):
    """A target: bounds of what is measured, and of its ratio to another measurement of the same run."""

    least: float | None = None
    most: float | None = None
    least_ratio: float | None = None
    most_ratio: float | None = None

    def text(self, unit: str, beside: str) -> str:
        """The target in words."""
        parts = []
        for sign, bound in ((">=", self.least), ("<=", self.most)):
            if bound is not None:
                parts.append(f"{sign} {bound:g} {unit}")
        for sign, bound in ((">=", self.least_ratio), ("<=", self.most_ratio)):
            if bound is not None:
                parts.append(f"{sign} {bound:g}x {beside}")
        return ", ".join(parts)

    def holds(self, measured: float, ratio: float | None) -> bool:
        """Whether it is held; bounds of a ratio count only when the other was measured."""
        return (
            (self.least is None or measured >= self.least)
            and (self.most is None or measured <= self.most)
            and (ratio is None or self.least_ratio is None or ratio >= self.least_ratio)
            and (ratio is None or self.most_ratio is None or ratio <= self.most_ratio)
        )


def row(
    name: str,
    measured: float,
    unit: str,
    *,
    limit: Limit | None = None,
    beside: str = "",
    other: float | None = None,
    note: str = "",
) -> Row:
    """A line of the table from a measurement, its target and what it is compared with."""
    ratio = measured / other if other else None
    held: bool | None = None
    if limit is not None and (other is not None or limit.least is not None or limit.most is not None):
        held = limit.holds(measured, ratio)
    target = "" if limit is None else limit.text(unit, beside)
    return Row(
        name=name, measured=measured, unit=unit, target=target, held=held, beside=beside, other=other, ratio=ratio,
        note=note,
    )  # fmt: skip


def pin(core: int | None = None) -> None:
    """Keep this process on one core: the last that it may use when none is named. Without the system call it stays free."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if core is None else core})


def microseconds(call: Callable[[Any], object], arguments: Sequence[object]) -> float:
    """Median time of a call in microseconds, once for each argument."""
    clock = time.perf_counter_ns
    times = []
    for argument in arguments:
        begin = clock()
        call(argument)
        times.append(clock() - begin)
    return statistics.median(times) / 1e3


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; none where the system doesn't tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class Worker:
    """A process that runs a module of this folder and answers commands."""

    def __init__(self, module: str, *, python: str = sys.executable, arguments: Iterable[str] = ()) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.hello = self._read()

    def ask(self, do: str, **arguments: object) -> Any:  # noqa: ANN401 - plain data
        """Have a command run and return its answer."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:  # noqa: ANN401 - plain data
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmarks.{self._name} ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def obey(commands: dict[str, Callable[..., object]], hello: object) -> None:
    """Be a worker: answer commands until there are no more."""
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("do")](**command)), flush=True)


async def serve_until_closed(hello: object) -> None:
    """Be a worker that serves over NATS: say so, and return when the one who started it is done or gone."""
    print(json.dumps(hello), flush=True)
    await anyio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


def quiet() -> None:
    """Only warnings are logged."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
