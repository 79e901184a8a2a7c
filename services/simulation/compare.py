"""Several runs side by side, in processes of their own, with progress."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kvplane.services.process.modules import look_here
from kvplane.services.process.workers import CONTEXT, results, workers
from kvplane.services.protocol.errors import NotServed
from kvplane.services.routing.choice import Choice, parse
from kvplane.services.routing.policies import allow, check
from kvplane.services.simulation.desk import Router
from kvplane.services.simulation.peer import POLICY, PeerDesk
from kvplane.services.simulation.results import summarize
from kvplane.services.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvplane.services.simulation.results import Summary
    from kvplane.services.simulation.trace import Work
    from kvplane.services.simulation.world import Outcome, Settings


def parse_choice(text: str) -> Choice:
    """Read a policy as it is written, and check it. Raises `BadRequest`."""
    choice = parse(text)
    policy, parameters = choice.policy, choice.parameters
    if policy == POLICY:
        return choice
    if ":" in policy:
        # Whoever names a module on the command line means it to be imported.
        look_here()
        allow([policy.partition(":")[0]])
    check(policy, parameters)
    return choice


def run(settings: Settings, work: Sequence[Work], progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """One run, by a policy of kvplane or by the peer's selector."""
    desk = partial(PeerDesk, parameters=settings.parameters) if settings.policy == POLICY else Router
    return World(settings, work, desk).run(progress)


_shared: tuple[Sequence[Work], float, float | None, Any] | None = None


def _begin(work: Sequence[Work], ideal: float, goal: float | None, counts: Any) -> None:  # noqa: ANN401 - shared array
    global _shared  # noqa: PLW0603 - what a worker process is given once
    _shared = work, ideal, goal, counts


def _one(number: int, choice: Choice, settings: Settings, keep: bool) -> tuple[Summary, Outcome | None]:  # noqa: FBT001
    if _shared is None:
        raise RuntimeError("the process was not begun")
    work, ideal, goal, counts = _shared
    if ":" in choice.policy:
        parse_choice(choice.text)

    def progress(done: int) -> None:
        counts[number] = done

    outcome = run(settings, work, progress)
    if not outcome.served:
        raise NotServed(f"with {choice.text}, none of {len(work)} requests could be served; is the capacity too small?")
    return summarize(outcome, choice.text, ideal, goal), outcome if keep else None


def compare(
    runs: Sequence[tuple[Choice, Settings]], work: Sequence[Work], ideal: float, *, processes: int, keep: bool = False,
    goal: float | None = None, progress: Callable[[int], None] = lambda _: None,
) -> list[tuple[Summary, Outcome | None]]:  # fmt: skip
    """Make all runs over the same requests. `progress` is called with the sum of requests that have arrived in them.

    `ideal` is the ideal hit rate, `goal` the wanted TTFT in seconds. With `keep`, the outcomes are given as well. Results do
    not depend on the number of processes.
    """
    counts = CONTEXT.Array("q", len(runs))
    with workers(min(processes, len(runs)), _begin, work, ideal, goal, counts) as submit:
        jobs = [submit(_one, number, choice, settings, keep) for number, (choice, settings) in enumerate(runs)]
        return results(jobs, lambda: progress(sum(counts[:])))
