"""Commands about snapshots of the fold, and about what of the log they make unnecessary: `snapshot take|list`, `compact`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from kvplane.events.log.snapshots import SnapshotStore
from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, question, show_json
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.show import Column
from kvplane.services.cli.words import seconds
from kvplane.services.protocol import messages

PATIENCE_SECONDS = 600.0

snapshot = App(name="snapshot", help="Snapshots of the fleet's state, from which replicas start.")


@snapshot.command
def take(*, json: Json = False, common: Common = COMMON) -> None:
    """Take a snapshot now. Coordinators take them by themselves as the log grows.

    Parameters
    ----------
    json
        Print JSON.
    """
    answer = question(common, "coordinator.snapshot", messages.StatusRequest(), seconds=PATIENCE_SECONDS)
    if json:
        show_json(answer)
    elif answer.get("changed") is False:
        show.say(f"there is one at sequence {answer['sequence']:,} already")
    else:
        show.pairs([
            ("sequence", f"{answer['sequence']:,}"),
            ("size", f"{answer['bytes'] / 1e6:,.2f} MB"),
            ("took", f"{seconds(answer['seconds'])}; the coordinator stood still for {seconds(answer['pause'])}"),
        ])  # fmt: skip


@snapshot.command(name="list")
def list_snapshots(*, json: Json = False, common: Common = COMMON) -> None:
    """List the snapshots, the newest first.

    Parameters
    ----------
    json
        Print JSON.
    """
    start(common, quiet=True)
    sequences = run_async(_sequences, common)
    if json:
        show_json(sequences)
    else:
        show.table([Column("sequence", number=True)], [[f"{sequence:,}"] for sequence in sequences])
        if not sequences:
            show.say("No snapshots yet: `kvplane snapshot take` takes one.", error=True)


async def _sequences(common: Common) -> list[int]:
    async with common.connected("kvplane-snapshot", seconds=CONNECT_SECONDS) as client:
        return await SnapshotStore(client, common.fleet).sequences()


def compact(
    *,
    without_history: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Purge the log below its oldest snapshot, and below what the history has stored. Nothing is lost that way.

    Parameters
    ----------
    without_history
        There is no historian and is to be none: what is purged can't be asked for any more.
    json
        Print JSON.
    """
    request = messages.CompactRequest(without_history=without_history)
    answer = question(common, "coordinator.compact", request, seconds=PATIENCE_SECONDS)
    if json:
        show_json(answer)
        return
    show.pairs([
        ("log begins", f"at sequence {answer['first']:,}"),
        ("purged", f"{answer['purged']:,} commits, {answer['freed_bytes'] / 1e6:,.2f} MB"),
        ("kept for", ", ".join(f"{name} at {answer[name]:,}" for name in ("snapshot", "history") if name in answer)),
    ])  # fmt: skip
