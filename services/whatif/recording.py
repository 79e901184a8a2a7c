"""What was recorded of a span of a fleet's log, as far as it can be simulated, asked of the historian."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from kvplane.projections.history.replay import node_events, packed_hashes, policy_events
from kvplane.projections.snapshot import load
from kvplane.services.history.client import table
from kvplane.services.history.when import when
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest, BeforeHistory, Refused
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.pieces import snapshot_at
from kvplane.services.simulation.world import Outcome, Served, Settings
from kvplane.services.whatif.recorded import Recorded, RecordedChange, RecordedRequest, recorded_from

if TYPE_CHECKING:
    import pyarrow as pa
    from nats.aio.client import Client

    from kvplane.projections.fleet import FleetState

PATIENCE_SECONDS = 600.0
"""How long a past state may take."""
MOST_REQUESTS = 1_000_000
USED_REQUESTS = 50_000
"""Earlier requests that are looked at for the order in which nodes used their blocks."""
REALLY = "really"
_NS = 1_000_000_000

REQUESTS = """
    SELECT d.request, d.model, d.session, d.tokens, d.hashes, d.exclude, d.node, d.sequence,
      epoch_us(coalesce(d.decided, d.time)) AS arrival, d."match" * coalesce(d.block_size, 0) AS predicted,
      c.status, c.ttft, c.duration, c.cached_tokens, coalesce(c.output_tokens, 16) AS output_tokens
    FROM decisions d LEFT JOIN completions c ON c.request = d.request AND c.routed = d.sequence
    WHERE d.sequence > {since} AND d.sequence <= {until} ORDER BY d.sequence, d.event
"""
USED = f"""
    SELECT node, hashes FROM (
      SELECT sequence, event, node, hashes FROM decisions WHERE sequence <= {{since}}
      ORDER BY sequence DESC, event DESC LIMIT {USED_REQUESTS}
    ) ORDER BY sequence, event
"""
NODES = """
    SELECT * EXCLUDE (time), epoch_us(time) AS us FROM node_changes
    WHERE sequence > {since} AND sequence <= {until} ORDER BY sequence
"""
POLICIES = """
    SELECT * EXCLUDE (time), epoch_us(time) AS us FROM policy_changes
    WHERE sequence > {since} AND sequence <= {until} ORDER BY sequence
"""


class Span(Struct):
    """What was recorded: what to simulate, and how it really went."""

    recorded: Recorded
    really: Outcome
    counted: float
    """Requests that arrive before this only warm up, in seconds from the beginning."""


def span(
    state: FleetState, requests: pa.Table, used: pa.Table, nodes: pa.Table, policies: pa.Table, *, counted: int
) -> Span:
    """Make a span of what the queries above give; requests count from `counted` on, in unix microseconds."""
    first = state.time / _NS
    found: dict[str, RecordedRequest] = {}
    served: list[Served] = []
    names = dict.fromkeys(state.nodes)
    rows = requests.drop_columns(["hashes"]).to_pylist()
    for row, hashes in zip(rows, packed_hashes(requests["hashes"]), strict=True):
        arrival = max(0.0, row["arrival"] / 1e6 - first)
        found.setdefault(
            row["request"],
            RecordedRequest(
                hashes=hashes, tokens=row["tokens"], output_tokens=row["output_tokens"], session=row["session"],
                arrival=arrival, request=row["request"], model=row["model"], exclude=tuple(row["exclude"]),
            ),
        )  # fmt: skip
        if row["status"] == "ok":
            names.setdefault(row["node"])
            # A request that was sent again is counted from its first sending.
            began = found[row["request"]].arrival
            served.append(
                Served(
                    list(names).index(row["node"]), began, arrival + row["ttft"], arrival + row["duration"],
                    row["tokens"], row["cached_tokens"], row["predicted"], row["request"],
                )
            )  # fmt: skip
    moments = {
        sequence: micros / 1e6 - first
        for table in (nodes, policies)
        for sequence, micros in zip(table["sequence"].to_pylist(), table["us"].to_pylist(), strict=True)
    }
    events = {**node_events(nodes), **policy_events(policies)}
    changes = [
        RecordedChange(max(0.0, moments[sequence]), event)  # type: ignore[arg-type]
        for (sequence, _), event in sorted(events.items())
    ]
    order = zip(used["node"].to_pylist(), packed_hashes(used["hashes"]), strict=True)
    recorded = recorded_from(state, list(found.values()), changes, used=order)
    settings = Settings(nodes=len(state.nodes), policy=REALLY)
    really = Outcome(settings, list(names), served, 0, 0, [0.0] * len(names), 0, "")
    return Span(recorded, really, counted / 1e6 - first)


async def recorded_span(
    client: Client, fleet: str, since: str | None, until: str | None, *, warm: float
) -> tuple[Span, int, int]:
    """Ask a historian for a span, and its first and last sequence; `warm` seconds before it are fetched as well."""
    begin, end = await bounds(client, fleet, since, until)
    count, counted = await _rows(
        client, fleet,
        "SELECT count(*), min(epoch_us(coalesce(decided, time))) FROM decisions "
        f"WHERE sequence > {begin} AND sequence <= {end}",
    )  # fmt: skip
    if not count:
        raise nothing_routed(begin, end)
    if count > MOST_REQUESTS:
        raise BadRequest(f"the span has {count:,} requests; the limit is {MOST_REQUESTS:,}, choose a shorter one")
    (warmed,) = await _rows(
        client, fleet,
        f"SELECT coalesce(max(sequence), 0) FROM commits WHERE epoch_us(time) < {counted} - {int(warm * 1e6)} "
        f"AND sequence <= {begin}",
    )  # fmt: skip
    # Before the first node there is nothing to simulate.
    (noded,) = await _rows(client, fleet, "SELECT coalesce(min(sequence), 0) FROM node_changes")
    first = min(max(warmed, noded), begin)
    state = load(fleet, await snapshot_at(client, fleet, first))
    spans = {"since": first, "until": end}
    tables = [
        await table(client, fleet, query.format(**spans), seconds=None) for query in (REQUESTS, USED, NODES, POLICIES)
    ]
    return span(state, *tables, counted=counted if first < begin else 0), begin, end


async def bounds(client: Client, fleet: str, since: str | None, until: str | None) -> tuple[int, int]:
    """The sequence before a span's first decision, and its last one. Raises `BadRequest` for one that is empty."""
    begin = await _begin(client, fleet, since)
    end = await _sequence(client, fleet, until) if until else await _last(client, fleet)
    if begin >= end:
        raise BadRequest(
            f"the span is empty: it begins after sequence {begin} and ends at {end}; choose an earlier --since or a "
            "later --until"
        )
    return begin, end


def nothing_routed(begin: int, end: int) -> BadRequest:
    """What is said of a span without requests."""
    return BadRequest(f"no request was routed from sequence {begin} to {end}; choose a longer span")


async def _rows(client: Client, fleet: str, query: str) -> tuple[Any, ...]:
    found = await table(client, fleet, query)
    return tuple(column[0].as_py() for column in found.columns)


async def _sequence(client: Client, fleet: str, at: str) -> int:
    answer: dict[str, Any] = await ask(client, f"kv.{fleet}.history.sequence", messages.MomentRequest(at=at))
    return int(answer["sequence"])


async def _begin(client: Client, fleet: str, since: str | None) -> int:
    """Sequence before the first decision from a moment on."""
    # Before the first decision there is nothing that could be missed.
    (first,) = await _rows(client, fleet, "SELECT coalesce(min(sequence), 1) - 1 FROM decisions")
    if not since:
        return int(first)
    try:
        return max(int(first), await _sequence(client, fleet, since))
    except Refused as error:
        # A time before the first commit, such as the beginning of its day.
        if error.code != BeforeHistory.code or isinstance(when(since, datetime.now(UTC)), int):
            raise
        return int(first)


async def _last(client: Client, fleet: str) -> int:
    (last,) = await _rows(client, fleet, "SELECT coalesce(max(sequence), 0) FROM commits")
    return int(last)
