"""What attacks on the historian begin with: a log of every kind of commit, the history that must come of it, and historians."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name, subject
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.rows import Rows, Waiting
from kvplane.projections.history.store import Store
from kvplane.projections.history.tables import TABLES
from kvplane.services.history.historian import Historian
from kvplane.services.rpc.client import ask
from tests.support.fork_server import Program

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    import msgspec
    from duckdb import DuckDBPyConnection
    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.events.subjects import Topic

NAME = "default"
FAR = 4_000_000_000_000_000
"""A time in unix microseconds at which every hour of today is closed."""

_KINDS = {
    types.BlocksStored: ("cache_changes", "stored"),
    types.BlocksRemoved: ("cache_changes", "removed"),
    types.BlocksPlaced: ("cache_changes", "placed"),
    types.CacheCleared: ("cache_changes", "cleared"),
    types.GroupStored: ("group_changes", "stored"),
    types.GroupRemoved: ("group_changes", "removed"),
    types.NodeRegistered: ("node_changes", "registered"),
    types.NodeCordoned: ("node_changes", "cordoned"),
    types.NodeUncordoned: ("node_changes", "uncordoned"),
    types.NodeLost: ("node_changes", "lost"),
    types.NodeRecovered: ("node_changes", "recovered"),
    types.NodeRemoved: ("node_changes", "removed"),
    types.RequestRouted: ("decisions", ""),
    types.RequestCompleted: ("completions", ""),
    types.RequestHeld: ("holds", ""),
    types.RequestReleased: ("holds", "released"),
    types.PolicyChanged: ("policy_changes", ""),
    types.FormatRaised: ("format_changes", ""),
}


class Scribe:
    """Writes random commits of every kind to a log that nobody else writes."""

    def __init__(self, client: Client, seed: int = 0) -> None:
        self.client = client
        self.sequence = 0
        self.requests = 0
        self._rng = random.Random(seed)
        self._epochs: dict[str, int] = {}
        self._counters: dict[str, int] = {}
        self._running: list[tuple[str, str]] = []

    async def write(self, count: int) -> int:
        """Write so many commits and wait until all are stored; the last sequence."""
        await open_stream(self.client.jetstream(), NAME, create=True)
        for _ in range(count):
            self.sequence += 1
            await self._one()
            if not self.sequence % 100:
                await self.client.flush()
        await self.client.flush()
        with anyio.fail_after(20):
            while (await open_stream(self.client.jetstream(), NAME)).last_seq < self.sequence:
                await anyio.sleep(0.01)
        return self.sequence

    async def _one(self) -> None:
        rng = self._rng
        node = f"node-{rng.randrange(4)}"
        draw = rng.random()
        if node not in self._epochs or draw < 0.02:
            self._epochs[node] = self.sequence
            mode: Any = "managed" if node == "node-3" else "reported"
            registered = types.NodeRegistered(node, "host:1", ["m", "alias"], 16, {"gpu": 64, "cpu": 16}, mode)
            await self._put("node", node, [registered])
        elif draw < 0.05:
            changes = [types.NodeCordoned(node, "why"), types.NodeUncordoned(node), types.NodeRecovered(node)]
            await self._put("node", node, [rng.choice([*changes, types.NodeLost(node, "silence")])])
        elif draw < 0.35:
            await self._put("cache", node, self._cache(node))
        elif draw < 0.45:
            session = f"s{rng.randrange(9)}"
            assigned = types.SessionAssigned(session, "m", node, rng.choice(["new", "from node-1"]))
            await self._put("session", "m", [rng.choice([assigned, types.SessionEnded(session, "m", "over")])])
        elif draw < 0.47:
            await self._put("control", "", [types.PolicyChanged("ttft", {"session_seconds": rng.random()})])
        elif draw < 0.51:
            await self._raw(
                f"kv.{NAME}.{rng.choice(['cache.a', 'access.x', 'control'])}", rng.randbytes(20), {"a": "b"}
            )
        else:
            await self._put("access", "router-1", [self._access(node) for _ in range(rng.randrange(1, 6))])

    def _cache(self, node: str) -> list[types.Event]:
        rng = self._rng
        begin = rng.randrange(60)
        hashes = pack_hashes(range(begin + 1, begin + rng.randrange(2, 9)))
        epoch = self._epochs[node]
        if node == "node-3":
            return [types.BlocksPlaced(node, epoch, hashes, b"", None, "")]
        return [
            types.BlocksStored(node, epoch, 2 * self.sequence, hashes, None, rng.choice(types.TIERS[:2])),
            types.BlocksRemoved(node, epoch, 2 * self.sequence + 1, hashes[:8])
            if rng.random() < 0.9
            else types.CacheCleared(node, epoch, 2 * self.sequence + 1, "reset"),
        ]

    def _access(self, node: str) -> types.Event:
        rng = self._rng
        if self._running and rng.random() < 0.5:
            request, place = self._running.pop(rng.randrange(len(self._running)))
            return types.RequestCompleted(request, place, "ok", 100, 16, 9, 0.25, 1.5)
        if rng.random() < 0.1:
            return types.RequestReleased(f"r{self.requests}", "m", "room", 2.5)
        self.requests += 1
        request = f"r{self.requests}"
        if rng.random() < 0.1:
            return types.RequestHeld(
                request, "m", 20, "s", "t", 1, "full", 2, 7.5, 1, pack_hashes([7]), 3, 1_700_000_000_000_000, "00-1"
            )
        self._running.append((request, node))
        count = rng.randrange(1, 8)
        candidates = [types.Candidate(f"node-{at}", rng.randrange(count), rng.random()) for at in range(3)]
        return types.RequestRouted(
            request, "m", node, 1, count, count * 16 + 3, pack_hashes(rng.choices(range(1, 99), k=count)), "", "ttft",
            max(0, self.sequence - 3), candidates, 1, 1_700_000_000_000_000 + self.sequence, ["node-9"],
        )  # fmt: skip

    async def _put(self, topic: Topic, name: str, events: Sequence[types.Event]) -> None:
        place = subject(NAME, topic, name)
        counter = self._counters[place] = self._counters.get(place, 0) + (self._rng.random() > 0.02)
        body = codec.encode(events)
        headers = {codec.WRITER: name or "scribe", codec.WRITER_SEQ: str(counter), codec.CRC32: codec.checksum(body)}
        await self._raw(place, body, headers)

    async def _raw(self, place: str, body: bytes, headers: dict[str, str]) -> None:
        await self.client.publish(place, body, headers=headers)


async def messages_of(client: Client, fleet: str = NAME) -> list[Message]:
    """The whole log."""
    found: list[Message] = []
    await replay(client, fleet, found.append)
    return found


async def last_word(client: Client, node: str, fleet: str = NAME) -> types.Event:
    """The log's last event about a node itself."""
    bodies = [
        message.body for message in await messages_of(client, fleet) if message.subject == f"kv.{fleet}.node.{node}"
    ]
    return codec.decode_body("node", bodies[-1])[-1]


def one_go(folder: Path, log: Sequence[Message], fleet: str = NAME) -> Store:
    """The history that must come of a log: folded from zero, written at once, never archived."""
    state, rows, waiting = FleetState(fleet), Rows(), Waiting()
    for message in log:
        rows.add(message, state.apply(message), state, waiting)
    store = Store(folder, fleet)
    store.write(rows, time=state.time)
    return store


def counted(log: Sequence[Message], after: int = 0) -> Counter[tuple[str, str]]:
    """How many events of each kind a fold from zero applied, counted beside everything that makes rows."""
    state, found = FleetState(NAME), Counter[tuple[str, str]]()
    for message in log:
        applied = state.apply(message)
        if message.sequence <= after:
            continue
        found["commits", "" if applied.skipped is None else applied.skipped] += 1
        for event in applied.commit.events if applied.commit is not None else ():
            if isinstance(event, types.SessionAssigned):
                found["session_changes", "moved" if event.reason.startswith("from") else "new"] += 1
            elif isinstance(event, types.SessionEnded):
                found["session_changes", "ended"] += 1
            else:
                found[_KINDS[type(event)]] += 1
    return found


def counted_rows(store: Store, after: int = 0) -> Counter[tuple[str, str]]:
    """The same in SQL."""
    found = Counter[tuple[str, str]]()
    for table in TABLES:
        names = {column.name for column in table.columns}
        kind = "change" if "change" in names else "coalesce(skipped, '')" if table.name == "commits" else "''"
        rows = store.cursor().execute(
            f"SELECT {kind}, count(*) FROM {table.name} WHERE sequence > {after} GROUP BY ALL"
        )
        found.update({(table.name, change): count for change, count in rows.fetchall() if count})
    return found


def check_unbroken(connection: DuckDBPyConnection, last: int) -> int:
    """Commits are there once each, without a gap, up to the last one; the first one."""
    ((count, different, first, found),) = connection.execute(
        "SELECT count(*), count(DISTINCT sequence), min(sequence), max(sequence) FROM commits"
    ).fetchall()
    assert count == different
    if count:
        assert (found, count) == (last, last - first + 1)
    return int(first or 0)


def listed_files(store: Store) -> tuple[set[str], set[str]]:
    """Archived files as the list names them, and as they lie there."""
    listed = {name for (name,) in store.cursor().execute("SELECT name FROM archive_files").fetchall()}
    there = {str(path.relative_to(store.archive)) for path in store.archive.rglob("*") if path.is_file()}
    return listed, there


async def purge(client: Client, upto: int) -> int:
    """Take the log's messages below a sequence away; where it begins then."""
    await client.jetstream().purge_stream(stream_name(NAME), seq=upto)
    return int((await open_stream(client.jetstream(), NAME)).first_seq)


@asynccontextmanager
async def historian(url: str, folder: Path, **options: Any) -> AsyncIterator[Historian]:
    """A historian in this process, ready to be asked."""
    async with connected([url], "historian") as client, anyio.create_task_group() as group:
        running = Historian(client, NAME, folder, servers=[url], **options)
        await group.start(running.run)
        try:
            yield running
        finally:
            group.cancel_scope.cancel()


async def question(client: Client, endpoint: str, request: msgspec.Struct, *, seconds: float = 20) -> Any:
    """What an endpoint of the fleet answers, as plain data."""
    return await ask(client, f"kv.{NAME}.{endpoint}", request, seconds=seconds)


@contextmanager
def commanded(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run kvplane in a process of its own beside the test."""
    with Program(
        [sys.executable, "-m", "kvplane", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
