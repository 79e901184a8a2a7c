"""Commands that read the log: `events tail`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape

from kvplane.events import codec
from kvplane.events.errors import BadCommit
from kvplane.events.log.follow import Follower, single
from kvplane.events.log.stream import open_stream
from kvplane.services.cli.ask import CONNECT_SECONDS, Json
from kvplane.services.cli.common import COMMON, Common, run_until_signal, start

if TYPE_CHECKING:
    from kvplane.events.codec import Message

events = App(name="events", help="Read the events of the log.")


@events.command
def tail(
    *,
    last: int = 20,
    since: Annotated[int | None, Parameter(name="--from")] = None,
    follow: bool = True,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Print events as they are on the log: the last ones, then those that come.

    Parameters
    ----------
    last
        How many commits to begin with.
    since
        Begin at this sequence instead.
    follow
        Go on with what comes, until Ctrl-C.
    json
        Print one JSON object a line.
    """
    start(common, quiet=True)
    run_until_signal(_tail, last, since, follow, json, common)


async def _tail(last: int, since: int | None, follow: bool, json: bool, common: Common) -> None:  # noqa: FBT001
    console = Console(highlight=False, soft_wrap=True)

    def show(message: Message) -> None:
        for line in describe(common.fleet, message):
            if json:
                sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
            else:
                console.print(as_text(line))
        sys.stdout.flush()

    async with common.connected("kvplane-tail", seconds=CONNECT_SECONDS) as client:
        held = await open_stream(client.jetstream(), common.fleet)
        first = since if since is not None else held.last_seq - max(0, last) + 1
        applied = min(held.last_seq, max(first, held.first_seq, 1) - 1)
        follower = Follower(client, common.fleet, show, applied=applied)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(follower.run)
                await follower.caught_up.wait()
                if not follow:
                    group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise single(errors) from None


def describe(fleet: str, message: Message) -> list[dict[str, Any]]:
    """A message of the log as plain data, one entry an event; a bad one as one entry with the reason."""
    head: dict[str, Any] = {
        "sequence": message.sequence,
        "time": datetime.fromtimestamp(message.time / 1e9, UTC).isoformat(timespec="milliseconds"),
        "subject": message.subject,
    }
    try:
        commit = codec.decode(fleet, message)
    except BadCommit as error:
        return [{**head, "skipped": error.code, "detail": str(error)}]
    if commit.writer:
        head["writer"] = commit.writer
    return [{**head, **codec.to_builtins(event)} for event in commit.events]


def as_text(line: dict[str, Any]) -> str:
    """One line for people: long lists of hashes become their count and ends."""
    head = f"[dim]{line['sequence']:>7} {line['time'][11:23]}[/]"
    if "skipped" in line:
        return f"{head} [red]skipped {line['skipped']}[/] {escape(line['subject'])}: {escape(line['detail'])}"
    fields = []
    for key, value in line.items():
        if key in {"sequence", "time", "subject", "writer", "type", "candidates", "engine_hashes"}:
            continue
        text = f"{len(value)}:{value[0][:8]}..{value[-1][:8]}" if _is_hashes(value) else str(value)
        fields.append(f"[dim]{key}=[/]{escape(text)}")
    return f"{head} [bold]{line['type'].rpartition('.')[0]}[/] {' '.join(fields)}"


def _is_hashes(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value)
