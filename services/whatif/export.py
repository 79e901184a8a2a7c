"""The recorded requests as a trace for `kvplane simulate`: anonymous, with sessions and delays.

Blocks are numbered in the order in which they appear, sessions as well; times count from the first request. A delay is the
time from the answer before it in its session, as the node ended it, to the request's arrival at the router. A request that was
sent again is one line. The history is asked piece by piece: what is kept here is a number for each block and session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from kvplane.events.hashing import unpack_hashes
from kvplane.projections.history.replay import packed_hashes
from kvplane.services.history.client import pages, table
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.roles.leases import ABANDONED
from kvplane.services.simulation.trace import TraceRequest
from kvplane.services.whatif.recording import bounds, nothing_routed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    import pyarrow as pa
    from nats.aio.client import Client

PIECE = 4_000_000
"""Blocks of decisions that are asked for at once; a decision counts as a hundred more."""
UNKNOWN_OUTPUT = 16
"""Tokens of an answer whose end nobody recorded."""

MODELS = """
    SELECT model, count(*) AS requests, sum(blocks + 100)::UBIGINT AS size, min(block_size) AS smallest,
      max(block_size) AS largest
    FROM decisions WHERE sequence > {since} AND sequence <= {until} GROUP BY model ORDER BY requests DESC, model
"""
CUTS = """
    SELECT max(sequence) AS sequence FROM (
      SELECT sequence, sum(blocks + 100) OVER (ORDER BY sequence, event) AS so_far FROM decisions
      WHERE sequence > {since} AND sequence <= {until}
    ) GROUP BY so_far // {piece} ORDER BY 1
"""
REQUESTS = """
    WITH d AS (
      SELECT request, model, session, tokens, hashes, sequence, event, epoch_us(coalesce(decided, time)) AS arrival
      FROM decisions WHERE sequence > {begin} AND sequence <= {end} AND model IN ({models})
    ), firsts AS (
      SELECT request, min(sequence * 65536 + event) AS first FROM decisions
      WHERE sequence > {since} AND sequence <= {end} AND request IN (SELECT request FROM d) GROUP BY request
    ), ends AS (
      SELECT request, unnest(arg_max(
        {{'status': status, 'duration': duration, 'output': output_tokens, 'routed': routed, 'stored': time}},
        {{'ok': status = 'ok', 'sequence': sequence, 'event': event}}
      )) FROM completions WHERE sequence > {begin} AND request IN (SELECT request FROM d) GROUP BY request
    )
    SELECT d.model, d.session, d.tokens, d.hashes, d.arrival, ends.status, ends.output,
      epoch_us(coalesce(r.decided, r.time, ends.stored)) AS began, ends.duration
    FROM d JOIN firsts ON firsts.request = d.request AND firsts.first = d.sequence * 65536 + d.event
      LEFT JOIN ends ON ends.request = d.request
      LEFT JOIN decisions r ON r.sequence = ends.routed AND r.request = d.request
    ORDER BY d.sequence, d.event
"""


class Exported(Struct):
    """What was exported, in numbers."""

    block_size: int
    models: list[str]
    requests: int = 0
    sessions: int = 0
    alone: int = 0
    """Requests without a session."""
    seconds: float = 0.0
    """From the first request to the last one."""
    unanswered: int = 0
    """Requests whose end nobody recorded; their answer counts as done at once."""
    overlapping: int = 0
    """Requests that came before the answer before them in their session; their delay is 0."""
    unrecorded: int = 0
    """Requests whose blocks were not recorded; they share nothing with others."""


class _Session(Struct):
    name: str
    last: float
    """Time of its last line, in milliseconds."""
    ended: int
    """When its last answer was there, in unix microseconds."""


class Writer:
    """Makes lines of a trace of the rows of `REQUESTS`, as they come."""

    def __init__(self, made: Exported) -> None:
        self.made = made
        self._begin: int | None = None
        self._blocks: dict[str, dict[int, int]] = {}
        """Of each model: what one has cached is of no use to another."""
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._fresh = 0

    def lines(self, rows: pa.Table) -> Iterator[TraceRequest]:
        """The lines of a piece."""
        plain = rows.drop_columns(["hashes"]).to_pylist()
        for row, hashes in zip(plain, packed_hashes(rows["hashes"]), strict=True):
            yield self._line(row, unpack_hashes(hashes))

    def _line(self, row: dict[str, Any], hashes: Sequence[int]) -> TraceRequest:
        made = self.made
        arrival: int = row["arrival"]
        if self._begin is None:
            self._begin = arrival
        time = max(0.0, (arrival - self._begin) / 1000)
        known = row["status"] is not None and row["status"] != ABANDONED
        ended = arrival
        if known:
            ended = max(arrival, row["began"] + round((row["duration"] or 0.0) * 1e6))
        delay = None
        key = row["model"], row["session"]
        session = self._sessions.get(key) if row["session"] else None
        if session is not None:
            made.overlapping += arrival < session.ended
            delay = round(max(0, arrival - session.ended) / 1000, 3)
            # Routers' clocks may differ a little.
            session.last = time = max(time, session.last)
            session.ended = max(session.ended, ended)
        elif row["session"]:
            made.sessions += 1
            session = self._sessions[key] = _Session(f"session-{made.sessions}", time, ended)
        made.requests += 1
        made.alone += session is None
        made.unanswered += not known
        made.seconds = max(made.seconds, time / 1000)
        return TraceRequest(
            timestamp=round(time, 3), input_length=row["tokens"], delay=delay, hash_ids=self._numbers(row, hashes),
            output_length=(row["output"] or 0) if known else UNKNOWN_OUTPUT, session=session.name if session else "",
            block_size=made.block_size,
        )  # fmt: skip

    def _numbers(self, row: dict[str, Any], hashes: Sequence[int]) -> list[int]:
        full = row["tokens"] // self.made.block_size
        blocks = self._blocks.setdefault(row["model"], {})
        found = [blocks.get(block, 0) for block in hashes[:full]]
        for place, number in enumerate(found):
            if not number:
                found[place] = blocks[hashes[place]] = self._next()
        self.made.unrecorded += len(found) < full
        return found + [self._next() for _ in range(full - len(found))]

    def _next(self) -> int:
        self._fresh += 1
        return self._fresh


async def export(
    client: Client, fleet: str, *, since: str | None = None, until: str | None = None, models: Sequence[str] = (),
    piece: int = PIECE, progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> AsyncGenerator[tuple[TraceRequest, Exported]]:  # fmt: skip
    """The lines of a trace, with what has been exported so far, for as long as they are asked for.

    `progress` is called with the decisions that were read, and all of them. Raises `BadRequest` when there is nothing in the
    span, or several models and none was chosen.
    """
    first, last = await bounds(client, fleet, since, until)
    span = {"since": first, "until": last}
    found = (await table(client, fleet, MODELS.format(**span))).to_pylist()
    if not found:
        raise nothing_routed(first, last)
    made = chosen(found, models)
    total = sum(row["requests"] for row in found)
    cuts = []
    if sum(row["size"] for row in found) > piece:
        cuts = (await table(client, fleet, CUTS.format(**span, piece=piece)))["sequence"].to_pylist()
    writer = Writer(made)
    names = ", ".join("'" + name.replace("'", "''") + "'" for name in made.models)
    done, begin = 0, first
    # Decisions of one commit are never parted.
    for end in [*dict.fromkeys(cut for cut in cuts if cut < last), last]:
        query = REQUESTS.format(since=first, begin=begin, end=end, models=names)
        async for page in pages(client, fleet, query):
            for line in writer.lines(page):
                yield line, made
            progress(min(total, done := done + page.num_rows), total)
        begin = end


def chosen(found: Sequence[dict[str, Any]], models: Sequence[str]) -> Exported:
    """Which models are exported, and their block size."""
    there = {row["model"]: row for row in found}
    known = ", ".join(f"{name} ({row['requests']:,})" for name, row in there.items())
    for name in models:
        if name not in there:
            raise BadRequest(f"no request for model {name!r} was routed in the span; there are requests for {known}")
    if not models and len(there) > 1:
        raise BadRequest(f"the span has requests for several models: choose with --model, of {known}")
    chosen = list(dict.fromkeys(models)) or list(there)
    sizes = sorted({row[name] for row in map(there.__getitem__, chosen) for name in ("smallest", "largest")} - {None})
    if len(sizes) > 1:
        raise BadRequest(
            f"a trace has one block size, and there were blocks of {' and '.join(map(str, sizes))} tokens: choose one model "
            "with --model, or a shorter span"
        )
    if not sizes:
        raise BadRequest(
            "nobody recorded the block size of these requests: their nodes were gone when they were routed"
        )
    return Exported(block_size=sizes[0], models=chosen)
