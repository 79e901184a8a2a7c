"""The part of the tutorial about past states: what `state --at`, `diff` and `explain` say of the tutorial's log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docs.tutorial.log import LOST
from kvplane.events import types
from kvplane.projections.fleet import FleetState
from kvplane.projections.overview import Picture, changes
from kvplane.services.routing.explain import Past
from kvplane.services.simulation.world import FLEET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from docs.tutorial.notebook import Notebook
    from kvplane.events.codec import Message

_CANDIDATES = 5


class _Replay:
    """A log read again up to where it is asked for."""

    def __init__(self, log: Sequence[Message]) -> None:
        self._log = log
        self.state = FleetState(FLEET)

    def to(self, sequence: int) -> None:
        for message in self._log[self.state.sequence : sequence]:
            self.state.apply(message)


def states(page: Notebook, log: Sequence[Message]) -> None:
    """The fleet before and after a loss."""
    page.title("What did the fleet look like before the node was lost?", 3)
    rows = page.ask(f"""
        SELECT sequence, time FROM node_timeline WHERE node = '{LOST}' AND change = 'lost'
    """)
    lost = rows[0]["sequence"]
    page.say(
        "The state at any sequence or time can be had again: it is folded from the nearest snapshot. The last one "
        "before:"
    )
    page.code(f"kvplane state --at {lost - 1}")
    replay = _Replay(log)
    replay.to(lost - 1)
    before = Picture(replay.state)
    whole = before.overview
    page.table(
        ["node", "state", "blocks", "capacity", "active", "sessions"],
        (
            [
                row["node"],
                row["state"],
                row["held_blocks"]["gpu"],
                row["capacity_blocks"]["gpu"],
                row["active"],
                row["sessions"],
            ]
            for row in whole["rows"]
        ),
        range(2, 6),
    )
    page.say(
        f"Its digest is `{whole['digest']}`, the same wherever this log is folded. With `--node {LOST}` the command "
        "also "
        "lists what ran there and its sessions. What the loss changed, commit by commit or from a time to a time:"
    )
    page.code(f"kvplane diff {lost - 1} {lost}")
    replay.to(lost)
    found = changes(before, Picture(replay.state))
    page.table(
        ["", "then", "later"],
        (
            [name, *pair]
            for name, pair in found["numbers"].items()
            if pair[0] != pair[1] and name not in {"digest", "time"}
        ),
        (1, 2),
    )
    page.table(
        ["node", "what", "changed", "blocks that left"],
        (
            [
                row["node"],
                row["what"],
                "; ".join(f"{field}: {one} -> {other}" for field, (one, other) in row["changed"].items()),
                row["blocks"].get("gpu", {"left": 0})["left"],
            ]
            for row in found["nodes"]
        ),
        (3,),
    )


def explanation(page: Notebook, log: Sequence[Message]) -> None:
    """One decision, made again."""
    page.title("Why did this request go where it went?", 3)
    page.say("Take one for which a longer match was passed over:")
    rows = page.ask("""
        SELECT sequence, request, node, "match", best_match, policy, cost FROM decisions
        WHERE policy = 'ttft' AND best_match > "match" ORDER BY best_match - "match" DESC, sequence LIMIT 1
    """)
    request, sequence = rows[0]["request"], rows[0]["sequence"]
    page.say("`explain` reads the log up to what the router had applied, decides again, and compares:")
    page.code(f"kvplane explain {request} --sequence {sequence}")
    past = _past(log, sequence)
    explained = past.explain()
    terms = list(dict.fromkeys(term for weight in explained.candidates for term in weight.terms))
    page.table(
        ["node", "cost", *terms, "match", "active", "queue (s)"],
        (
            [
                weight.node,
                weight.cost,
                *(weight.terms.get(term) for term in terms),
                weight.match,
                weight.active,
                weight.queue,
            ]
            for weight in explained.candidates[:_CANDIDATES]
        ),
        range(1, len(terms) + 5),
    )
    verdict = (
        "agrees: it is the decision that was recorded"
        if not explained.differences
        else "differs from what was recorded"
    )
    chosen, other = explained.candidates[0], max(explained.candidates, key=lambda weight: weight.match)
    page.say(
        f"It {verdict}. The chosen node is first; the terms of the policy, in its unit, sum up to the cost. "
        f"{other.node} held {other.match} blocks, {chosen.node} {chosen.match}; its queue of {other.queue:.2f} s, "
        f"against {chosen.queue:.2f} s, "
        "and its other terms cost more than the blocks would have saved. When the verdict is `differs`, the code is "
        "not what it was, or the router knew more than the log; the command then ends with exit code 1."
    )


def _past(log: Sequence[Message], sequence: int) -> Past:
    """The router of a decision, at the moment of that decision."""
    state = FleetState(FLEET)
    router, own = log[sequence - 1].subject, []
    for message in log[:sequence]:
        commit = state.apply(message).commit
        if commit is not None and message.subject == router:
            own += [event for event in commit.events if isinstance(event, types.RequestRouted)]
    past = Past(FleetState(FLEET), router.rpartition(".")[2], own)
    for message in log[: own[-1].applied]:
        past.apply(message)
    return past
