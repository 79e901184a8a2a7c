"""The adapter beside an engine: what it translates a second, what it remembers, how it catches up, and how soon it is seen.

An engine of real sockets (that of the tests), the adapter and a router are processes of their own; the coordinator is in this
one. What the engine says is a mix: events of 1 to 64 blocks, and, once its cache is full, removals of one block each.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import msgspec

from benchmarks.common import Limit, Row, Worker, obey, pin, quiet, resident_bytes, row, serve_until_closed
from kvplane.events.hashing import block_hashes
from kvplane.events.log.connection import connected
from kvplane.services.embedded.server import embedded_server, free_port
from kvplane.services.engines.adapter import LINGER_SECONDS, Adapter
from kvplane.services.engines.attachment import AdapterConfig
from kvplane.services.engines.facts import Engine, check
from kvplane.services.engines.sequence import Track
from kvplane.services.engines.sockets import replay
from kvplane.services.engines.translate import FORMER_NAMES, Translator
from kvplane.services.protocol import messages
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask
from tests.support.fake_engine import FakeEngine, running

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg

FLEET = "bench"
MODEL = "m"
BLOCK_TOKENS = 16
VOCABULARY = range(150_000)
CAPACITY = 1 << 16
"""Blocks of the engine: a million tokens."""
MIX = (1, 2, 4, 8, 16, 32, 64)
COLD = (64,)
NAMES = {"int": "numbers of 64 bits", "bytes": "names of 32 bytes"}

SPEED = Limit(least=300_000)
MEMORY = Limit(most=250)
REPLAY = Limit(most=2)
DELAY = Limit(most=15)

PUBLISH, REPLAYED, ATTACH, SEEN = (f"bench.engines.{what}" for what in ("publish", "replay", "attach", "seen"))
INTERVAL_SECONDS = 0.01
"""Between two batches while the delay is measured: a hundred engine steps a second."""
_SECONDS = 60.0
T = TypeVar("T")


class Steps:
    """What an engine publishes, step by step; the oldest blocks go first, so that nothing but counts need be kept."""

    def __init__(self, names: str, capacity: int, sizes: Sequence[int], seed: int = 0) -> None:
        self._bytes, self._capacity, self._sizes = names == "bytes", capacity, sizes
        self._draw = random.Random(seed)
        self.stored = self.removed = 0

    @property
    def held(self) -> int:
        """Blocks in the engine's cache."""
        return self.stored - self.removed

    def _name(self, number: int) -> int | bytes:
        value = (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
        return value.to_bytes(8) * 4 if self._bytes else value

    def step(self, *, root: bool = False) -> list[dict[str, Any]]:
        """Events of one batch. Every third one begins a prompt, the others go on with the one before."""
        size = self._draw.choice(self._sizes)
        root = root or not self.stored or not self._draw.randrange(3)
        gone = range(self.removed, max(self.removed, self.stored + size - self._capacity))
        names = [self._name(number) for number in range(self.stored, self.stored + size)]
        events: list[dict[str, Any]] = [
            {"type": "BlockRemoved", "block_hashes": [self._name(number)], "medium": "GPU", "group_idx": 0}
            for number in gone
        ]
        events.append({
            "type": "BlockStored", "block_hashes": names, "parent_block_hash": None if root else self._name(self.stored - 1),
            "token_ids": self._draw.choices(VOCABULARY, k=size * BLOCK_TOKENS), "block_size": BLOCK_TOKENS, "lora_id": None,
            "medium": "GPU", "lora_name": None, "extra_keys": [None] * size, "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        })  # fmt: skip
        self.removed = gone.stop
        self.stored += size
        return events


def _track(capacity: int) -> Track:
    track = Track(Translator("n", BLOCK_TOKENS, {"gpu": capacity}))
    track.next = 0
    return track


def _apply(track: Track, payload: bytes) -> int:
    """Translate the next batch; how many events of the fleet it made."""
    events = track.live(track.next or 0, payload)
    if events is None:
        raise RuntimeError("a batch was not applied")
    return len(events)


def _check(track: Track, steps: Steps) -> None:
    translator = track.translator
    if translator.used() != steps.held or track.gaps or translator.oddities():
        raise RuntimeError(f"{translator.used()} blocks of {steps.held}, {track.gaps} gaps, {translator.oddities()}")


def translate(names: str, sizes: list[int], blocks: int, full: int) -> dict[str, float]:
    """Worker: blocks stored and removed a second of this core's time, from bytes to events; `full` of them are held before."""
    encode = msgspec.msgpack.encode
    steps = Steps(names, full or blocks, sizes)
    track = _track(full or blocks)
    while steps.held < full - max(sizes):
        _apply(track, encode([1.0, steps.step(), 0]))
    stored, removed = steps.stored, steps.removed
    payloads = []
    while steps.stored - stored < blocks - max(sizes):
        payloads.append(encode([1.0, steps.step(), 0]))
    gc.collect()
    begin = time.process_time()
    for payload in payloads:
        _apply(track, payload)
    seconds = time.process_time() - begin
    _check(track, steps)
    changed = steps.stored - stored, steps.removed - removed
    return {"changed": sum(changed) / seconds, "stored": changed[0] / seconds}


def memory(names: str, most: int) -> dict[str, Any]:
    """Worker: bytes of RAM a block while a cache grows to `most` blocks and then turns over, measured often."""
    encode = msgspec.msgpack.encode
    steps, track = Steps(names, most, MIX), _track(most)
    gc.collect()
    before = resident_bytes()
    found: list[float] = []
    goal, full = most // 8, 0
    # So long that all names of blocks no longer held that are remembered are of blocks that were evicted.
    while before is not None and steps.stored < most + 2 * FORMER_NAMES:
        _apply(track, encode([1.0, steps.step(), 0]))
        if steps.stored >= goal:
            found.append(((resident_bytes() or 0) - before) / steps.held)
            goal += most // 64
            full += steps.held < most - max(MIX)
    _check(track, steps)
    return {"growing": found[:full], "turning": found[full:]}


class Publish(msgspec.Struct):
    """What the engine is to publish: so many batches that nobody receives, or the one that it has ready."""

    missed: int = 0


class Published(msgspec.Struct):
    """When the engine published (monotonic nanoseconds), what it held then, and the block hashes of the next batch."""

    at: int
    held: int
    following: bytes


class Wanted(msgspec.Struct):
    """What must be seen of a node: these blocks one after the other, or so many."""

    node: str
    hashes: bytes = b""
    held: int = 0


class Timed(msgspec.Struct):
    """When it began and ended, monotonic nanoseconds, and how many batches it took."""

    began: int
    ended: int
    batches: int = 0


async def _ask(client: Client, to: str, question: object, form: type[T]) -> T:
    answer = await client.request(to, msgspec.msgpack.encode(question), timeout=_SECONDS)
    decoded: T = msgspec.msgpack.decode(answer.data, type=form)
    return decoded


async def _serve(client: Client, to: str, form: type[Any], answer: Any) -> None:  # noqa: ANN401 - a coroutine function
    async def handle(message: Msg) -> None:
        reply = await answer(msgspec.msgpack.decode(message.data, type=form))
        await message.respond(msgspec.msgpack.encode(reply))

    await client.subscribe(to, cb=handle)
    await client.flush()


async def engine(url: str) -> None:
    """Worker: an engine of real sockets."""
    steps = Steps("bytes", CAPACITY, MIX)
    fake = FakeEngine(capacity=CAPACITY, size=BLOCK_TOKENS, buffer=1 << 20)

    waiting: list[dict[str, Any]] = []

    async def publish(what: Publish) -> Published:
        nonlocal waiting
        for _ in range(what.missed):
            fake.cache.queue += steps.step()
            fake.cache.step()
        fake.cache.queue += waiting
        at, held = time.monotonic_ns(), steps.held
        await fake.publish()
        waiting = steps.step(root=True)
        return Published(at, held, block_hashes(waiting[-1]["token_ids"], BLOCK_TOKENS))

    async with connected([url], "engine") as client, running(fake):
        await _serve(client, PUBLISH, Publish, publish)
        await serve_until_closed({"url": fake.url})


async def adapter(url: str, engine_url: str) -> None:
    """Worker: replays, and attaches the engine as the node that a request names, one at a time."""
    async with (
        connected([url], "adapter") as client,
        Engine("vllm", engine_url) as http,
        anyio.create_task_group() as group,
    ):
        attached = anyio.CancelScope()

        async def ask_replay(_: str) -> Timed:
            began = time.monotonic_ns()
            replayed, ended = await replay((await http.facts()).sources[0].replay, http.host, 0)
            if not ended:
                raise RuntimeError("the replay did not end")
            return Timed(began, time.monotonic_ns(), len(replayed))

        async def run(node: str, *, task_status: anyio.abc.TaskStatus[Adapter]) -> None:
            facts = await http.facts()
            check("vllm", facts, facts.sources)
            made = Adapter(client, FLEET, http, facts, facts.sources[0], AdapterConfig(node=node, address=http.url))
            with attached:
                async with anyio.create_task_group() as inner:
                    await inner.start(made.run)
                    task_status.started(made)

        async def attach(node: str) -> Timed:
            nonlocal attached
            attached.cancel()
            attached = anyio.CancelScope()
            began = time.monotonic_ns()
            made: Adapter = await group.start(run, node)
            if made.track.gaps or made.track.translator.oddities():
                raise RuntimeError(f"{made.track.gaps} gaps, {made.track.translator.oddities()}")
            return Timed(began, time.monotonic_ns(), made.track.position + 1)

        await _serve(client, REPLAYED, str, ask_replay)
        await _serve(client, ATTACH, str, attach)
        await serve_until_closed({"ready": True})
        group.cancel_scope.cancel()


async def router(url: str) -> None:
    """Worker: a router, which answers when something of a node can be seen."""
    async with connected([url], "router") as client, anyio.create_task_group() as group:
        service = Router(client, FLEET)
        await group.start(service.run)

        def seen(wanted: Wanted) -> bool:
            node = service.state.nodes.get(wanted.node)
            if node is None:
                return False
            if not wanted.hashes:
                return service.state.caches.held(node, "gpu") == wanted.held
            slot = node.slots.get("gpu")
            lengths = service.state.caches.index(MODEL).match(wanted.hashes)
            return slot is not None and slot < len(lengths) and lengths[slot] == len(wanted.hashes) // 8

        async def watch(message: Msg) -> None:
            wanted = msgspec.msgpack.decode(message.data, type=Wanted)
            while not seen(wanted):
                await service.replica.reached(service.state.sequence + 1, seconds=_SECONDS)
            now = time.monotonic_ns()
            await message.respond(msgspec.msgpack.encode(now))

        async def hear(message: Msg) -> None:
            group.start_soon(watch, message)

        await client.subscribe(SEEN, cb=hear)
        await client.flush()
        await serve_until_closed({"ready": True})
        group.cancel_scope.cancel()


async def delays(client: Client, node: str, following: bytes, count: int) -> list[float]:
    """Milliseconds from when the engine publishes a batch until a router finds its blocks, shortest first."""
    sent: dict[bytes, int] = {}
    seen: dict[bytes, int] = {}

    async def see(hashes: bytes) -> None:
        seen[hashes] = await _ask(client, SEEN, Wanted(node, hashes), int)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            hashes = following
            group.start_soon(see, hashes)
            await anyio.sleep(INTERVAL_SECONDS)
            published = await _ask(client, PUBLISH, Publish(), Published)
            sent[hashes], following = published.at, published.following
    return sorted((seen[hashes] - at) / 1e6 for hashes, at in sent.items())


async def catching_up(*, quick: bool) -> list[Row]:
    """Rows about catching up and about the delay."""
    batches, rounds = (1000, 1) if quick else (10_000, 3)
    replays, attaches = [], []
    with tempfile.TemporaryDirectory() as folder:
        async with (
            embedded_server(Path(folder), port=free_port()) as server,
            connected([server.url], "bench") as client,
            connected([server.url], "coordinator") as other,
            anyio.create_task_group() as group,
        ):
            await group.start(Coordinator(other, FLEET).run)
            with (
                Worker("engines", arguments=["engine", server.url]) as there,
                Worker("engines", arguments=["router", server.url]),
                Worker("engines", arguments=["adapter", server.url, there.hello["url"]]),
            ):
                published = await _ask(client, PUBLISH, Publish(batches), Published)
                for turn in range(rounds):
                    took = await _ask(client, REPLAYED, "", Timed)
                    if took.batches != batches:
                        raise RuntimeError(f"{took.batches} batches of {batches}")
                    replays.append((took.ended - took.began) / 1e9)
                    took = await _ask(client, ATTACH, f"n{turn}", Timed)
                    at = await _ask(client, SEEN, Wanted(f"n{turn}", held=published.held), int)
                    attaches.append((at - took.began) / 1e9)
                    if turn:
                        # Its adapter has ended; that it is lost is no news.
                        gone = messages.NodeRequest(node=f"n{turn - 1}")
                        await ask(client, f"kv.{FLEET}.coordinator.node.remove", gone)
                await anyio.sleep(2)
                took_ms = await delays(client, f"n{rounds - 1}", published.following, 100 if quick else 500)
            group.cancel_scope.cancel()
    p99 = took_ms[len(took_ms) * 99 // 100]
    return [
        row(f"engine: replay of {batches:,} batches", statistics.median(replays), "s", limit=REPLAY, note="the sockets alone"),
        row(
            f"engine: attach, {batches:,} batches behind", statistics.median(attaches), "s", limit=REPLAY,
            note=f"until a router sees all {published.held:,} blocks",
        ),
        row(
            "engine: batch until visible in a router, median", statistics.median(took_ms), "ms", limit=DELAY,
            note=f"p99 {p99:.1f} ms, {1 / INTERVAL_SECONDS:.0f} batches/s, group commit at {LINGER_SECONDS * 1e3:g} ms",
        ),
    ]  # fmt: skip


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    blocks, rounds = (1 << 15, 2) if quick else (1 << 18, 3)
    rows = []
    for names, title in NAMES.items():
        with Worker("engines", arguments=["worker"]) as worker:
            for kind, sizes, full in (("64-block events", COLD, 0), ("mix, cache full", MIX, CAPACITY)):
                turns = [
                    worker.ask("translate", names=names, sizes=sizes, blocks=blocks, full=full) for _ in range(rounds)
                ]
                changed, stored = (statistics.median(turn[what] for turn in turns) for what in ("changed", "stored"))
                rows.append(
                    row(
                        f"engine: {kind}, {title}", changed, "blocks/s", limit=SPEED,
                        note=f"{stored:,.0f} stored and as many removed" if full else "stored",
                    )
                )  # fmt: skip
    for names, title in NAMES.items():
        with Worker("engines", arguments=["worker"]) as worker:
            found = worker.ask("memory", names=names, most=1 << 17 if quick else 1 << 19)
        if found["growing"]:
            note = f"RAM, worst of {len(found['growing'])} sizes, median {statistics.median(found['growing']):.0f}"
            rows.append(
                row(
                    f"engine: memory a block, {title}", max(found["growing"]), "B", limit=MEMORY,
                    note=f"{note}; full and turning over {max(found['turning']):.0f}",
                )
            )  # fmt: skip
    rows += anyio.run(lambda: catching_up(quick=quick), backend_options={"use_uvloop": True})
    return rows


def main() -> None:
    quiet()
    role, *rest = sys.argv[1:]
    if role == "worker":
        pin()
        obey({"translate": translate, "memory": memory}, {"ready": True})
    else:
        serves: dict[str, Callable[..., Awaitable[None]]] = {"engine": engine, "adapter": adapter, "router": router}
        anyio.run(serves[role], *rest, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
