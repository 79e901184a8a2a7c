"""One member of the fleet that does its worst with valid credentials: `python -m tests.chaos.hostile node --seed 3 ...`.

It draws one move after the other from the seed, each for a few seconds, until it is ended. What is refused is part of it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import msgspec
import structlog

from kvplane.events import codec, types
from kvplane.events.log.connection import connected
from kvplane.events.subjects import access_name, token
from kvplane.services.auth.roles import ROLES
from kvplane.services.protocol.endpoints import ENDPOINTS
from tests.support.hostile import Hostile, bodies

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.client import Client

    from kvplane.services.auth.roles import Role

EVIL = "evil"
"""Its name in every role."""
MOVE_SECONDS = (0.5, 4.0)
LONG_HASHES = 65_536
NICE = 10
"""It is to be a stranger's machine that works so hard, not this one."""
QUERIES = (
    "SELECT list_sum(list_transform(range(200000), x -> list_sum(list_transform(range(200), y -> x * y))))",
    "SELECT length(repeat(repeat('x', 30000), 30000))",
    "SELECT " + ".".join("a" * 15_000),
    "SELECT count(*) FROM range(100000000) a, range(100000) b",
    "WITH RECURSIVE t(x) AS (SELECT 'x' UNION ALL SELECT x || x FROM t) SELECT max(length(x)) FROM t",
    "SELECT * FROM range(10000000)",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
)


class Member:
    """One hostile member. `move` names are drawn, so a new one needs no more than its method."""

    def __init__(self, client: Client, role: Role, fleet: str, seed: int) -> None:
        self.client = client
        self.role = role
        self.fleet = fleet
        self.rng = random.Random(f"{role} {seed}")
        self.hostile = Hostile(random.Random(f"fuzz {role} {seed}"))
        self.done = Counter[str]()
        self.times: list[tuple[str, float, float]] = []
        """Each move that has ended, with its begin and end (monotonic seconds)."""
        self.epoch = 0

    def moves(self) -> list[Callable[[], Awaitable[None]]]:
        """What its role can try."""
        everyone = [self.fuzz, self.crowd, self.forge_replies]
        own: dict[str, list[Callable[[], Awaitable[None]]]] = {
            "node": [
                self.many_models, self.many_lives, self.many_blocks, self.false_completions, self.heartbeats, self.nonsense,
                self.never_fetch, self.into_inboxes,
            ],
            "client": [
                self.long_routes, self.long_routes, self.expensive_sql, self.open_results, self.long_pasts, self.large_prompts,
                self.list_services,
            ],
            "historian": [self.consumers, self.consumers_of_snapshots, self.false_history, self.into_inboxes],
        }  # fmt: skip
        return own[self.role] + everyone

    async def run(self) -> None:
        """One move after the other, until cancelled."""
        moves = self.moves()
        while True:
            move = self.rng.choice(moves)
            name, begin = getattr(move, "__name__", ""), time.monotonic()
            self.done[name] += 1
            # A client that can't publish, a refusal, an answer that does not come: on with the next.
            with anyio.move_on_after(self.rng.uniform(*MOVE_SECONDS)), suppress(Exception):
                await move()
            self.times.append((name, begin, time.monotonic()))
            await anyio.sleep(0.01)

    def at(self, subject: str) -> str:
        return f"kv.{self.fleet}.{subject}"

    async def send(self, subject: str, body: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Publish; the server's patience is not to be used up by what this client holds."""
        await self.client.publish(self.at(subject), body, reply=reply, headers=headers)
        await anyio.sleep(0.001 if self.rng.randrange(50) else 0.02)

    async def ask(self, subject: str, request: dict[str, Any], seconds: float = 2) -> Any:
        answer = await self.client.request(self.at(subject), msgspec.msgpack.encode(request), timeout=seconds)
        return msgspec.msgpack.decode(answer.data)

    async def all_at_once(self, ask: Callable[[], Awaitable[Any]], count: int) -> None:
        async def one() -> None:
            while True:
                with suppress(Exception):
                    await ask()
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(one)

    async def fuzz(self) -> None:
        """Requests that nearly fit, to everything that it may ask."""
        known = {"node": EVIL, "model": "m", "tokens": [1, 2], "request": "r", "at": 3, "sql": "SELECT 1"}
        open_to = [spec for spec in ENDPOINTS if self.role in spec.askers] or list(ENDPOINTS)
        while True:
            spec = self.rng.choice(open_to)
            subject = spec.at(self.fleet, "x").removeprefix(f"kv.{self.fleet}.").replace("*", token(EVIL))
            for body in bodies(self.hostile.request(spec.request.__name__, known)):
                if len(body) < 1 << 20:
                    await self.send(subject, body, reply=self.client.new_inbox())

    async def crowd(self) -> None:
        """Connections that do nothing."""
        streams = []
        try:
            at = self.client.connected_url
            for _ in range(100 if at is not None else 0):
                streams.append(await anyio.connect_tcp(str(at.hostname), int(at.port or 4222)))  # type: ignore[union-attr]
            await anyio.sleep_forever()
        finally:
            for stream in streams:
                await anyio.aclose_forcefully(stream)

    async def forge_replies(self) -> None:
        """Requests whose answer would do something where it lands."""
        log = f"KV_{self.fleet}"
        targets = (
            f"$JS.API.STREAM.PURGE.{log}",
            f"$JS.API.STREAM.DELETE.{log}",
            self.at("control"),
            "$SRV.PING",
            self.at("route"),
        )
        while True:
            spec = self.rng.choice(ENDPOINTS)
            subject = spec.at(self.fleet, "x").removeprefix(f"kv.{self.fleet}.").replace("*", token(EVIL))
            await self.send(subject, b"{}", reply=self.rng.choice(targets))

    async def into_inboxes(self) -> None:
        """Messages to inboxes of others, as flow control that is to be answered somewhere."""
        reply = f"$JS.API.STREAM.PURGE.KV_{self.fleet}"
        for _ in range(2000):
            headers = self.rng.choice([{"Nats-Consumer-Stalled": reply}, {"Status": "100"}, None])
            inbox = f"_INBOX.{uuid4().hex}.{self.rng.randrange(99)}"
            await self.client.publish(inbox, b"", reply=reply, headers=headers)
            await anyio.sleep(0.001)

    async def register(self, model: str, **more: Any) -> None:
        request = {
            "node": EVIL, "address": "http://127.0.0.1:1/\x1b[2J", "models": [model], "block_size": 16,
            "capacity_blocks": {"gpu": 1 << 20}, "replace": True, "pulse_seconds": 1.0, **more,
        }  # fmt: skip
        self.epoch = (await self.ask(f"coordinator.node.register.{token(EVIL)}", request))["epoch"]

    async def many_models(self) -> None:
        """A registration after the other, each with models that nobody has heard of."""
        while True:
            await self.register(uuid4().hex, models=[uuid4().hex for _ in range(self.rng.choice([1, 64]))])

    async def many_lives(self) -> None:
        """It comes and leaves, with as many labels as there may be."""
        while True:
            await self.register("evil-model", labels={f"l{n}": "\u202e" * 500 for n in range(64)})
            await self.ask(
                f"coordinator.node.leave.{token(EVIL)}", {"node": EVIL, "epoch": self.epoch, "reason": "x" * 500}
            )

    async def many_blocks(self) -> None:
        """Blocks without end."""
        await self.register("evil-model")
        for batch in range(200):
            blocks = self.rng.randbytes(8 * 20_000)
            event = types.BlocksStored(EVIL, self.epoch, batch, blocks)
            await self.send(f"cache.{token(EVIL)}", codec.encode([event]))

    async def false_completions(self) -> None:
        """Requests that it completed, of others and of nobody, in times that can't be."""
        subject = f"access.{token(access_name(EVIL))}"
        while True:
            took = self.rng.choice([0.0, 1e-9, 1e12, float("inf"), 3600.0])
            count = self.rng.choice([1, 5000])
            events = [
                types.RequestCompleted(uuid4().hex, EVIL, "x" * 500, 1 << 50, 0, 1, took, took) for _ in range(count)
            ]
            await self.send(subject, codec.encode(events))

    async def heartbeats(self) -> None:
        """Far too many, of many lives."""
        while True:
            body = {
                "node": self.rng.choice([EVIL, "sim-a"]),
                "epoch": self.rng.randrange(1 << 40),
                "active": -(1 << 60),
            }
            await self.send(f"pulse.{token(EVIL)}", msgspec.msgpack.encode(body))

    async def nonsense(self) -> None:
        """Anything at all under its own name."""
        while True:
            body = self.rng.choice([self.rng.randbytes(200), b"[" * 9000, b"", b'{"stream":"KV","seq":1}'])
            headers = {
                codec.WRITER: "evil\x7f" * self.rng.randrange(40),
                codec.WRITER_SEQ: str(self.rng.randrange(1 << 50)),
            }
            await self.send(f"cache.{token(EVIL)}", body, headers=self.rng.choice([headers, None]))

    async def never_fetch(self) -> None:
        """What it held before, asked for again and again."""
        names = {"node": EVIL}
        await self.all_at_once(lambda: self.ask(f"coordinator.cache.names.{token(EVIL)}", names), 8)

    async def long_routes(self) -> None:
        """Requests as long as they may be, that nobody completes."""

        async def one() -> None:
            hashes = self.rng.randbytes(8 * LONG_HASHES)
            await self.ask("route", {"model": self.rng.choice(["m", "sim"]), "hashes": hashes, "lease_seconds": 900.0})

        await self.all_at_once(one, 4)

    async def large_prompts(self) -> None:
        """Prompts of megabytes, to be hashed."""
        prompt = {"model": "sim", "prompt": "x" * (7 << 20), "request": ""}
        await self.all_at_once(lambda: self.ask("route", prompt), 3)

    async def expensive_sql(self) -> None:
        """Queries that take all that there is."""
        await self.all_at_once(lambda: self.ask("sql", {"sql": self.rng.choice(QUERIES), "seconds": 3600.0}, 30), 4)

    async def open_results(self) -> None:
        """Results that are opened and never fetched."""
        while True:
            await self.ask("sql", {"sql": "SELECT * FROM range(100000000)", "rows": 100_000_000}, 5)

    async def long_pasts(self) -> None:
        """States of the past, many at a time."""

        async def one() -> None:
            await self.ask("history.changes", {"first": self.rng.randrange(1, 99), "second": "now"}, 20)

        await self.all_at_once(one, 8)

    async def list_services(self) -> None:
        """Everybody is asked who they are, all the time."""
        while True:
            for verb in ("PING", "INFO", "STATS"):
                await self.client.publish(f"$SRV.{verb}", b"", reply=self.client.new_inbox())
                await anyio.sleep(0.001)

    async def _consumer(self, stream: str, place: str) -> None:
        aim = self.rng.choice(["$SRV.PING", self.at("route"), "kv.other.x"])
        config = {
            "durable_name": f"{EVIL}-{uuid4().hex}", "deliver_subject": aim,
            "deliver_policy": "all", "ack_policy": "none", "idle_heartbeat": 100_000_000, "flow_control": True,
        }  # fmt: skip
        body = msgspec.json.encode({"stream_name": stream, "config": config})
        answer = await self.client.request(f"{place}.{config['durable_name']}", body, timeout=2)
        self.done["consumers"] += b'"created"' in answer.data

    async def consumers(self) -> None:
        """Consumers of the log that last, and deliver to services."""
        stream = f"KV_{self.fleet}"
        for _ in range(50):
            await self._consumer(stream, f"$JS.API.CONSUMER.CREATE.{stream}")

    async def consumers_of_snapshots(self) -> None:
        """The same of the snapshots' stream."""
        stream = f"OBJ_KV_{self.fleet}_snapshots"
        for _ in range(50):
            await self._consumer(stream, f"$JS.API.CONSUMER.CREATE.{stream}")

    async def false_history(self) -> None:
        """It answers in the place of the history: to replicas that start, and to those who ask."""

        async def lie(message: Any) -> None:
            with suppress(Exception):
                await message.respond(
                    self.rng.choice([b"\x80", b"\xff" * 99, msgspec.msgpack.encode({"result": "x", "data": b""})])
                )

        listening = []
        try:
            for endpoint in ("history.snapshot", "history.status"):
                listening.append(await self.client.subscribe(self.at(endpoint), queue="q", cb=lie))
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True), suppress(Exception):
                for each in listening:
                    await each.unsubscribe()


async def main() -> None:
    """Attack until the process is ended; what was tried stands in the file, written again and again."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.hostile", description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--server", action="append", required=True)
    parser.add_argument("--credentials", type=Path, required=True)
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.nice(NICE)
    # What is refused is what it lives of.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    async with (
        connected(
            options.server, EVIL, credentials=options.credentials, ca=options.ca, refused_seconds=math.inf
        ) as client,
        anyio.create_task_group() as group,
    ):
        member = Member(client, options.role, options.fleet, options.seed)
        group.start_soon(member.run)
        while True:
            await anyio.sleep(0.5)
            options.out.write_bytes(msgspec.json.encode({"done": member.done, "times": member.times}))


if __name__ == "__main__":
    sys.exit(anyio.run(main, backend_options={"use_uvloop": True}))
