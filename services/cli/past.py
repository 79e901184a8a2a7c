"""Commands about the past: `state`, `diff`, `explain`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anyio
from rich.console import Console

from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, question, show_json, show_nodes
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.show import Cell, Column, Styled
from kvplane.services.cli.words import here, moment, seconds, words
from kvplane.services.history.when import read_as, resolved
from kvplane.services.protocol import messages

PATIENCE_SECONDS = 600.0
"""How long a past state may take."""


def state(*, at: str | None = None, node: str = "", json: Json = False, common: Common = COMMON) -> None:
    """Rebuild the fleet's state from the log, now or at a past moment, and show what it holds and its digest.

    Parameters
    ----------
    at
        A sequence, or a time: 10m, 2h or 3d ago, yesterday, 2026-01-31, 2026-01-31T12:00 (UTC; for another zone
        with +02:00 or `local` behind it); needs a historian.
    node
        Only this node, with its sessions and what runs there; with --at.
    json
        Print JSON.
    """
    read = ""
    if at is None:
        start(common, quiet=True)
        found = run_async(_rebuild, common)
    else:
        at = resolved(at, here())
        read = read_as(at, datetime.now(UTC))
        found = question(common, "history.state", messages.MomentRequest(at=at, node=node), seconds=PATIENCE_SECONDS)
    if json:
        show_json(found)
        return
    rows, running, sessions = found.pop("rows", []), found.pop("running", None), found.pop("on_node", None)
    if "time" in found:
        found["time"] = moment(found["time"])
    if read:
        found = {"asked for": read, **found}
    show.pairs([(key, words(value)) for key, value in found.items()])
    if rows:
        show.say("")
        show_nodes(rows)
    if running is not None and sessions is not None:
        show.say("")
        show.pairs([
            ("running", ", ".join(row["request"] for row in running) or "nothing"),
            ("on node", ", ".join(sessions) or "no sessions"),
        ])  # fmt: skip


async def _rebuild(common: Common) -> dict[str, Any]:
    # The fold, which only this loads: what is asked of a historian needs none.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    from kvplane.events.log.follow import single  # noqa: PLC0415
    from kvplane.projections.overview import summary  # noqa: PLC0415
    from kvplane.services.replication.replica import Replica  # noqa: PLC0415

    async with common.connected("kvplane-state", seconds=CONNECT_SECONDS) as client:
        replica = Replica(client, common.fleet)
        columns = (TextColumn("reading the log"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                async with anyio.create_task_group() as group:
                    task = progress.add_task("log", total=None)
                    group.start_soon(replica.run)
                    while not replica.ready:
                        progress.update(task, total=replica.follower.target or None, completed=replica.state.sequence)
                        await anyio.sleep(0.01)
                    group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise single(errors) from None
        return summary(replica.state, digests=True)


def diff(first: str, second: str, *, json: Json = False, common: Common = COMMON) -> None:
    """Show what changed in the fleet between two moments.

    Parameters
    ----------
    first
        A sequence, or a time: 10m, 2h or 3d ago, yesterday, 2026-01-31, 2026-01-31T12:00 (UTC; for another zone
        with +02:00 or `local` behind it).
    second
        A later one, such as now.
    json
        Print JSON.
    """
    first, second = resolved(first, here()), resolved(second, here())
    read = [read_as(one, datetime.now(UTC)) for one in (first, second)]
    answer = question(
        common, "history.changes", messages.ChangesRequest(first=first, second=second), seconds=PATIENCE_SECONDS
    )
    if json:
        show_json(answer)
        return
    if any(read):
        show.pairs([(name, said) for name, said in zip(("then", "later"), read, strict=True) if said])
        show.say("")
    numbers = answer["numbers"]
    numbers["time"] = [moment(value) for value in numbers["time"]]
    show.table(
        [Column("what"), Column("then"), Column("later")],
        [[key, words(one), words(other)] for key, (one, other) in numbers.items() if one != other or key == "sequence"],
    )
    if answer["nodes"]:
        show.say("")
        _show_changes(answer["nodes"])
    sessions = answer["sessions"]
    show.say(f"sessions: {sessions['began']:,} began, {sessions['moved']:,} moved, {sessions['ended']:,} ended")


def _show_changes(nodes: list[dict[str, Any]]) -> None:
    rows = []
    for row in nodes:
        gpu = row["blocks"].get("gpu", {"came": 0, "left": 0, "stayed": 0})
        changed = "; ".join(f"{key}: {words(one)} -> {words(other)}" for key, (one, other) in row["changed"].items())
        rows.append(
            [row["node"], row["what"], f"{gpu['came']:,}", f"{gpu['left']:,}", f"{gpu['stayed']:,}", changed or "-"]
        )
    show.table(
        [
            Column("node"), Column("what"), Column("blocks that came", number=True), Column("left", number=True),
            Column("stayed", number=True, spare=1), Column("changed", prose=True),
        ],
        rows,
    )  # fmt: skip


def explain(request: str, *, sequence: int | None = None, json: Json = False, common: Common = COMMON) -> int:
    """Say why a request was sent where it was: make the decision again from the log, and compare. Exit code 1 if it differs.

    Parameters
    ----------
    request
        The request's id, as the router's answer gave it.
    sequence
        Which of its decisions, when it was sent again; default is the last one.
    json
        Print JSON.
    """
    answer = question(
        common, "explain", messages.ExplainRequest(request=request, sequence=sequence), seconds=PATIENCE_SECONDS
    )
    if json:
        show_json(answer)
    else:
        _show(answer)
    return 1 if answer["verdict"] == "differs" else 0


def _show(answer: dict[str, Any]) -> None:
    recorded, again = answer["recorded"], answer.get("recomputed", {})
    parameters = ", ".join(f"{key}={value:g}" for key, value in again.get("parameters", {}).items())
    others = [str(sequence) for sequence in answer["decisions"] if sequence != answer["sequence"]]
    decided = "not recorded" if answer["decided"] is None else moment(answer["decided"] * 1000)
    rows: list[tuple[str, Cell]] = [
        ("request", f"{answer['request']}: {recorded['tokens']:,} tokens in {recorded['blocks']:,} full blocks"),
        ("model", recorded["model"]),
        ("session", recorded["session"] or "none"),
        *([("tenant", recorded["tenant"])] if recorded.get("tenant") else []),
        ("trace", recorded["trace"] or (answer["outcome"] or {}).get("trace") or "none"),
        ("sent to", f"{recorded['node']}, {answer['kind']} match of {recorded['match']} blocks, longest {recorded['best']}"),
        ("decided", f"{decided} by {answer['router']}"),
        ("sequence", f"{answer['applied']:,} was applied, the decision is at {answer['sequence']:,}"),
        ("policy", recorded["policy"] + (f" ({parameters})" if parameters else "")),
        *_waited(answer.get("held")),
        ("excluded", ", ".join(recorded["exclude"]) or "no node"),
        ("outcome", _outcome(answer["outcome"])),
    ]  # fmt: skip
    if others:
        rows.append(("sent again", f"it has {len(others)} other decisions, at {', '.join(others)}; see --sequence"))
    show.pairs(rows)
    _show_attempts(answer)
    if again.get("candidates"):
        show.say("")
        _show_candidates(again["candidates"])
    show.say("")
    if again.get("failure"):
        show.say(
            Styled("the policy failed, and the least loaded node was taken: ", "yellow"), again["failure"]
        )  # fmt: skip
    if answer["verdict"] == "agrees":
        show.say(Styled("agrees", "green"), ": made again from the log, the decision is the one that was recorded")
    elif answer["verdict"] == "differs":
        show.say(Styled("differs", "red"), ": made again from the log, the decision is another one")
        for difference in again["differences"]:
            recorded_as, now = words(difference["recorded"]), words(difference["recomputed"])
            show.say(f"  {difference['what']}: recorded {recorded_as}, now {now}")
    else:
        show.say(f"not made again: {answer['verdict']}")


def _show_attempts(answer: dict[str, Any]) -> None:
    """What else was tried for the same request of a client, where that was anything."""
    attempts = answer.get("attempts")
    if not attempts:
        return
    show.say("")
    show.table(
        [
            Column("attempt"), Column("sequence", number=True), Column("leg", number=True), Column("node"),
            Column("tokens", number=True), Column("outcome", prose=True),
        ],
        [
            [
                row["request"], f"{row['sequence']:,}", f"{row['leg']}", row["node"],
                "-" if row["output_tokens"] is None else f"{row['output_tokens']:,}", row["status"] or "not completed",
            ]
            for row in attempts
        ],
        note="All attempts at the same request of a client: each leg goes on with the stream where the one before broke off.",
    )  # fmt: skip


_RELEASED = {
    "room": "until it had room", "bound": "as long as anyone waits (hold_seconds)", "off": "until nobody was held any more",
}  # fmt: skip


def _waited(held: dict[str, Any] | None) -> list[tuple[str, Cell]]:
    if held is None:
        return []
    how = _RELEASED.get(held["released"], held["released"])
    return [("waited", f"{seconds(held['waited'])}, {how}: at place {held['place']:,}, {held['reason']}")]


def _outcome(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "not completed"
    return (
        f"{outcome['status']} on {outcome['node']} in {seconds(outcome['duration'])}, first token after "
        f"{seconds(outcome['ttft'])}; "
        f"{outcome['cached_tokens']:,} of {outcome['prompt_tokens']:,} tokens cached, {outcome['predicted_tokens']:,} predicted"
    )


def _show_candidates(rows: list[dict[str, Any]]) -> None:
    """The candidates of a decision, the chosen one first. The terms of the cost go before the rest where room is short."""
    terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
    show.table(
        [
            Column("node"), Column("cost", number=True), *(Column(term, number=True, spare=2) for term in terms),
            Column("match", number=True, spare=1), Column("predicted", number=True, spare=3),
            Column("active", number=True, spare=1), Column("on the way", number=True, spare=4),
            Column("has the session", spare=3),
        ],
        [
            [
                row["node"], "not allowed" if row["cost"] is None else f"{row['cost']:.4g}",
                *(f"{row['terms'].get(term, 0):.4g}" for term in terms),
                f"{row['match']:,}", f"{row['match'] - row['match_on_log']:,}", f"{row['active']:,}",
                f"{row['on_the_way']:,}", "yes" if row["session"] else "-",
            ]
            for row in rows
        ],
        note="Costs and their terms are in the policy's unit; match: blocks; predicted: of these, blocks that the log had not "
        "confirmed yet; active: requests; on the way: of these, not on the log yet.",
    )  # fmt: skip
