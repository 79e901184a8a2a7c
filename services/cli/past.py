"""Commands about the past: `state`, `diff`, `explain`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anyio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvplane.events.log.follow import single
from kvplane.projections.overview import summary
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, grid, node_table, question, show_json
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.protocol import messages
from kvplane.services.replication.replica import Replica

PATIENCE_SECONDS = 600.0
"""How long a past state may take."""


def state(*, at: str | None = None, node: str = "", json: Json = False, common: Common = COMMON) -> None:
    """Rebuild the fleet's state from the log, now or at a past moment, and show what it holds and its digest.

    Parameters
    ----------
    at
        A sequence, or a time such as 2026-01-31T12:00:00 (UTC); needs a historian.
    node
        Only this node, with its sessions and what runs there; with --at.
    json
        Print JSON.
    """
    if at is None:
        start(common, quiet=True)
        found = run_async(_rebuild, common)
    else:
        found = question(common, "history.state", messages.MomentRequest(at=at, node=node), seconds=PATIENCE_SECONDS)
    if json:
        show_json(found)
        return
    rows, running, sessions = found.pop("rows", []), found.pop("running", None), found.pop("on_node", None)
    if "time" in found:
        found["time"] = moment(found["time"])
    grid([(key, _text(value)) for key, value in found.items()])
    if rows:
        Console().print(node_table(rows))
    if running is not None and sessions is not None:
        grid([
            ("running", ", ".join(escape(row["request"]) for row in running) or "nothing"),
            ("on node", ", ".join(map(escape, sessions)) or "no sessions"),
        ])  # fmt: skip


def _text(value: object) -> str:
    return escape(f"{value:,}" if isinstance(value, int) else str(value))


def moment(nanoseconds: int) -> str:
    """A time of the log, for people."""
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(sep=" ", timespec="milliseconds")[:-6] + " UTC"


async def _rebuild(common: Common) -> dict[str, Any]:
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
        A sequence, or a time such as 2026-01-31T12:00:00 (UTC).
    second
        A later one.
    json
        Print JSON.
    """
    answer = question(
        common, "history.changes", messages.ChangesRequest(first=first, second=second), seconds=PATIENCE_SECONDS
    )
    if json:
        show_json(answer)
        return
    numbers = answer["numbers"]
    numbers["time"] = [moment(value) for value in numbers["time"]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("then")
    table.add_column("later")
    for key, (one, other) in numbers.items():
        if one != other or key == "sequence":
            table.add_row(key, _text(one), _text(other))
    Console().print(table)
    if answer["nodes"]:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("node", "what", "changed"):
            table.add_column(column, overflow="fold")
        for column in ("blocks that came", "left", "stayed"):
            table.add_column(column, justify="right")
        for row in answer["nodes"]:
            gpu = row["blocks"].get("gpu", {"came": 0, "left": 0, "stayed": 0})
            changed = ", ".join(
                f"{key}: {_text(one)} -> {_text(other)}" for key, (one, other) in row["changed"].items()
            )
            table.add_row(
                row["node"], row["what"], changed, f"{gpu['came']:,}", f"{gpu['left']:,}", f"{gpu['stayed']:,}"
            )
        Console().print(table)
    sessions = answer["sessions"]
    Console().print(f"sessions: {sessions['began']} began, {sessions['moved']} moved, {sessions['ended']} ended")


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
    rows = [
        ("request", f"{answer['request']}: {recorded['tokens']:,} tokens in {recorded['blocks']:,} full blocks"),
        ("model", recorded["model"]),
        ("session", recorded["session"] or "none"),
        ("trace", recorded["trace"] or (answer["outcome"] or {}).get("trace") or "none"),
        ("sent to", f"{recorded['node']}, {answer['kind']} match of {recorded['match']} blocks, longest {recorded['best']}"),
        ("decided", f"{decided} by {answer['router']}"),
        ("sequence", f"{answer['applied']:,} was applied, the decision is {answer['sequence']:,}"),
        ("policy", recorded["policy"] + (f" ({parameters})" if parameters else "")),
        ("excluded", ", ".join(recorded["exclude"]) or "no node"),
        ("outcome", _outcome(answer["outcome"])),
    ]  # fmt: skip
    if others:
        rows.append(("sent again", f"it has {len(others)} other decisions, at {', '.join(others)}; see --sequence"))
    grid([(key, escape(value)) for key, value in rows])
    if again.get("candidates"):
        Console().print(candidates(again["candidates"]))
    if again.get("failure"):
        Console().print(
            f"[yellow]the policy failed, and the least loaded node was taken:[/] {escape(again['failure'])}"
        )
    if answer["verdict"] == "agrees":
        Console().print("[green]agrees[/]: made again from the log, the decision is the one that was recorded")
    elif answer["verdict"] == "differs":
        Console().print("[red]differs[/]: made again from the log, the decision is another one")
        for difference in again["differences"]:
            Console().print(
                f"  {escape(difference['what'])}: recorded {escape(str(difference['recorded']))}, "
                f"now {escape(str(difference['recomputed']))}", highlight=False,
            )  # fmt: skip
    else:
        Console().print(f"not made again: {escape(answer['verdict'])}")


def _outcome(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "not completed"
    return (
        f"{outcome['status']} on {outcome['node']} in {outcome['duration']:.3f} s, first token in {outcome['ttft']:.3f} s; "
        f"{outcome['cached_tokens']:,} of {outcome['prompt_tokens']:,} tokens cached, {outcome['predicted_tokens']:,} predicted"
    )


def candidates(rows: list[dict[str, Any]]) -> Table:
    """The candidates of a decision as a table, the chosen one first."""
    terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", overflow="fold")
    for column in ("cost", *terms, "match", "predicted", "active", "on the way"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            escape(row["node"]) + (" [dim](session)[/]" if row["session"] else ""),
            "not allowed" if row["cost"] is None else f"{row['cost']:.4g}",
            *(f"{row['terms'].get(term, 0):.4g}" for term in terms),
            str(row["match"]), str(row["match"] - row["match_on_log"]), str(row["active"]), str(row["on_the_way"]),
        )  # fmt: skip
    table.caption = "Costs are in the policy's unit; predicted: blocks of the match that the log had not confirmed yet."
    return table
