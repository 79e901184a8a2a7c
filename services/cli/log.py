"""Commands that read the log: `events tail`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import msgspec
from cyclopts import App, Parameter

from kvplane.events import codec
from kvplane.events.errors import BadCommit
from kvplane.events.log.follow import Follower, single
from kvplane.events.log.stream import open_stream
from kvplane.events.log.times import first_since
from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json
from kvplane.services.cli.common import COMMON, Common, run_until_signal, start
from kvplane.services.cli.show import Styled
from kvplane.services.cli.words import field, hashes, here, moment
from kvplane.services.history.when import resolved, when
from kvplane.services.process.terminal import json_text

if TYPE_CHECKING:
    from kvplane.events.codec import Message
    from kvplane.services.cli.show import Cell

HASHES = {"hashes", "evicted"}
"""Fields with the hashes of many blocks."""

SECONDS = {"ttft", "duration"}

events = App(name="events", help="Read the events of the log.")


@events.command
def tail(
    *,
    last: int = 20,
    since: Annotated[str | None, Parameter(name=["--since", "--from"])] = None,
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
        Begin at this moment instead: 10m, 2h or 3d ago, yesterday, 2026-01-31, 2026-01-31T12:00 (UTC), or a sequence.
    follow
        Go on with what comes, until Ctrl-C.
    json
        Print one JSON object a line.
    """
    start(common, quiet=True)
    begin = None if since is None else when(resolved(since, here()), datetime.now(UTC))
    run_until_signal(_tail, last, begin, follow, json, common)


async def _tail(
    last: int, begin: int | datetime | None, follow: bool, json: bool, common: Common  # noqa: FBT001
) -> None:  # fmt: skip
    def put(message: Message) -> None:
        for line in describe(common.fleet, message):
            if json:
                sys.stdout.write(json_text(msgspec.json.encode(line)) + "\n")
            else:
                show.say(*as_text(line), wrap=False)
        sys.stdout.flush()

    async with common.connected("kvplane-tail", seconds=CONNECT_SECONDS) as client:
        held = await open_stream(client.jetstream(), common.fleet)
        if isinstance(begin, datetime):
            first = await first_since(client.jetstream(), common.fleet, held, begin)
        else:
            first = begin if begin is not None else held.last_seq - max(0, last) + 1
        applied = min(held.last_seq, max(first, held.first_seq, 1) - 1)
        follower = Follower(client, common.fleet, put, applied=applied)
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


def as_text(line: dict[str, Any]) -> list[Cell]:
    """One line for people: long lists of hashes become their count and ends."""
    time = line["time"].replace("T", " ").removesuffix("+00:00")
    parts: list[Cell] = [Styled(f"{line['sequence']:>7} {time} UTC ", "dim")]
    if "skipped" in line:
        return [*parts, Styled(f"skipped {line['skipped']} ", "red"), f"{line['subject']}: {line['detail']}"]
    parts.append(Styled(line["type"].rpartition(".")[0], "bold"))
    for key, value in line.items():
        if key in {"sequence", "time", "subject", "writer", "type", "candidates", "engine_hashes"}:
            continue
        parts += [Styled(f" {key}=", "dim"), _value(key, value)]
    return parts


def _value(key: str, value: Any) -> str:  # noqa: ANN401 - any field of an event
    if key in HASHES and value:
        return hashes(value)
    if key == "decided":
        return field(moment(value * 1000))
    if key in SECONDS:
        return f"{value:.6f}s"
    return field(value)
