"""The engine's two sockets: batches as they are published, and the replay buffer.

A publisher binds when its endpoint holds `*` or `::` or is ipc or inproc, and connects otherwise; then the adapter binds. One
that bound a free port tells its own address, so an adapter connects where somebody listens already, or where it
can't bind. The replay socket always binds. High-water marks are off: with the defaults a long replay loses messages in silence.
"""

from __future__ import annotations

import socket
from collections import deque
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import structlog
import zmq
import zmq.asyncio

from kvplane.services.engines.publishers import EVENTS, Publishers
from kvplane.services.protocol.errors import EngineUnfit

if TYPE_CHECKING:
    from kvplane.services.engines.sequence import Numbered

INBOX_BATCHES = 100_000
INBOX_BYTES = 256 << 20
"""So much may wait to be translated; beyond it the batches are forgotten, and asked for again."""
READ_BATCHES = 1000
"""So many are taken from the socket before other tasks run."""
REPLAY_SECONDS = 5.0
"""How long a replay may send nothing."""
LOOK_SECONDS = 0.5
"""So long something may take to accept a connection at an address that may be ours."""
REPLAY_ROUNDS = 32
"""How often what is missing of a replay is asked for again."""

_SEQUENCE_BYTES = 8
_END = (-1).to_bytes(_SEQUENCE_BYTES, "big", signed=True)

_log = structlog.get_logger("kvplane.engines")


def engine_binds(endpoint: str) -> bool:
    """Whether an engine with this endpoint binds it."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _is_served(endpoint: str) -> bool:
    """Whether an engine that is there already binds this endpoint. Where nobody listens at an address of ours, it connects."""
    if engine_binds(endpoint) or not endpoint.startswith("tcp://"):
        return engine_binds(endpoint)
    try:
        parts = urlsplit(endpoint)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=LOOK_SECONDS):
            return True
    except TimeoutError:
        # Our own addresses refuse at once.
        return True
    except (OSError, ValueError):
        return False


def way_of(endpoint: str) -> tuple[str, str]:
    """`connect`, `bind` or nothing, as an endpoint is given with what the adapter has to do, and the endpoint without it."""
    way, colon, rest = endpoint.partition(":")
    return (way, rest) if colon and way in {"connect", "bind"} else ("", endpoint)


def reachable(endpoint: str, host: str) -> str:
    """An endpoint that the engine binds, as one to connect to: a wildcard becomes the engine's host."""
    for wildcard in ("tcp://*:", "tcp://0.0.0.0:", "tcp://[::]:", "tcp://:::"):
        if endpoint.startswith(wildcard):
            shown = f"[{host}]" if ":" in host else host
            return f"tcp://{shown}:{endpoint.removeprefix(wildcard)}"
    return endpoint


def host_of(url: str) -> str:
    """Host of a URL."""
    return urlsplit(url).hostname or "127.0.0.1"


class Published:
    """Batches of one engine as they are published. `run` receives them, `take` hands them over."""

    def __init__(self, endpoint: str, host: str) -> None:
        self._host = host
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._monitor = self._socket.get_monitor_socket(EVENTS)
        self.bound = False
        """The adapter listens there, and the engine connects."""
        self.endpoint = self._at = ""
        self.publishers = Publishers(way_of(endpoint)[1])
        self.move(endpoint)
        self.waiting: deque[Numbered] = deque()
        self._bytes = 0
        self.overflowed = False
        """Batches had to be forgotten because too many waited."""
        self.malformed = 0
        self.arrived = anyio.Event()

    def move(self, endpoint: str) -> None:
        """Receive at this endpoint, and at no other any more. Raises `EngineUnfit` where that can't be."""
        if self.endpoint:
            with suppress(zmq.ZMQError):
                (self._socket.unbind if self.bound else self._socket.disconnect)(self._at)
        way, self.endpoint = way_of(endpoint)
        if self.endpoint.endswith(":0"):
            self.close()
            raise EngineUnfit(
                f"the engine took any free port for its events and does not say which ({self.endpoint}); start it with a port "
                "in the `endpoint` of --kv-events-config, such as tcp://*:5557, or give its own one as --events"
            )
        self.publishers.endpoint = self.endpoint
        self._at = self.endpoint if way == "bind" else reachable(self.endpoint, self._host)
        ways = [way] if way else ["connect"] if _is_served(self.endpoint) else ["bind", "connect"]
        failed: list[str] = []
        for self.bound in (one == "bind" for one in ways):
            try:
                (self._socket.bind if self.bound else self._socket.connect)(self._at)
            except zmq.ZMQError as error:
                failed.append(f"{'listen' if self.bound else 'connect'}: {error}")
            else:
                return
        self.close()
        raise EngineUnfit(
            f"events can't be received at {self.endpoint!r} (the adapter can't {', nor '.join(failed)}); give --events the "
            "`endpoint` of the engine's --kv-events-config, such as tcp://*:5557"
        )

    def close(self) -> None:
        """Leave the engine."""
        with suppress(zmq.ZMQError):
            self._socket.disable_monitor()
        self._context.destroy(linger=0)

    async def run(self) -> None:
        """Receive until cancelled. Raises `EngineUnfit` when two engines publish here."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch)
            plain: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket)
            while True:
                await self._socket.poll()
                with suppress(zmq.Again):
                    for _ in range(READ_BATCHES):
                        if self.publishers.live > 1:
                            whole = plain.recv_multipart(zmq.NOBLOCK, copy=False)
                            self._receive([frame.bytes for frame in whole])
                            self.publishers.turn(whole[-1])
                        else:
                            self._receive(plain.recv_multipart(zmq.NOBLOCK))
                # Who connected is known before the first batch of it is: the same thread of ZMQ's reports both.
                self._connections()
                self._wake()

    async def _watch(self) -> None:
        while True:
            await self._monitor.poll()
            self._connections()
            self._wake()

    @property
    def connections(self) -> int:
        """How often an engine has connected. Batches that wait are of the last connection or of earlier ones."""
        return self.publishers.connections

    @property
    def live(self) -> int:
        """How many publishers are connected."""
        return self.publishers.live

    def _connections(self) -> None:
        self.publishers.look(zmq.Socket.shadow(self._monitor))

    def _receive(self, frames: list[bytes]) -> None:
        batch = _numbered(frames)
        if batch is None or batch[0] < 0:
            self.malformed += 1
            return
        if len(frames) > 2:
            self.publishers.heard(frames[0], zmq.Socket.shadow(self._monitor))
        self.waiting.append(batch)
        self._bytes += len(batch[1])
        if len(self.waiting) > INBOX_BATCHES or self._bytes > INBOX_BYTES:
            self.forget()
            self.overflowed = True

    def _wake(self) -> None:
        self.arrived.set()
        self.arrived = anyio.Event()

    def take(self) -> Numbered:
        """The batch that waits longest."""
        batch = self.waiting.popleft()
        self._bytes -= len(batch[1])
        return batch

    def put_back(self, batches: list[Numbered]) -> None:
        """Let these wait before all others."""
        self.waiting.extendleft(reversed(batches))
        self._bytes += sum(len(payload) for _, payload in batches)

    def forget(self) -> None:
        """Let none wait."""
        self.waiting.clear()
        self._bytes = 0


def _numbered(frames: list[bytes]) -> Numbered | None:
    """Number and payload of `[topic, number, payload]` or `[number, payload]`; none for anything else."""
    if len(frames) >= 2 and len(frames[-2]) == _SEQUENCE_BYTES:
        return int.from_bytes(frames[-2], "big", signed=True), frames[-1]
    return None


async def replay(
    endpoint: str, host: str, start: int, *, seconds: float = REPLAY_SECONDS
) -> tuple[list[Numbered], bool]:
    """Batches of the engine's replay buffer from `start` on, in order, and whether their end was reached.

    The engine's socket drops answers that it can't send fast enough, in silence. So what is missing is asked for again, and
    only what is missing at the beginning of an answer does not exist. An answer has stopped when nothing comes for `seconds`.
    """
    found: dict[int, bytes] = {}
    ask, ended = start, False
    for _ in range(REPLAY_ROUNDS):
        answers, ended = await _ask(endpoint, host, ask, seconds)
        found.update(answers)
        if not answers and not ended:
            break
        known = sorted(found)
        after = max(ask, answers[0][0] if answers else ask)
        missing = next((one + 1 for one, two in pairwise(known) if one >= after and two != one + 1), None)
        if missing is None:
            if ended:
                break
            missing = known[-1] + 1
        ask = missing
    return sorted(found.items()), ended


async def _ask(endpoint: str, host: str, start: int, seconds: float) -> tuple[list[Numbered], bool]:
    """One question. Answers are `["", topic, number, payload]`, from older engines without the topic; the end has number -1."""
    answers: list[Numbered] = []
    with zmq.asyncio.Context() as context:
        asked = context.socket(zmq.DEALER)
        try:
            asked.setsockopt(zmq.RCVHWM, 0)
            asked.setsockopt(zmq.LINGER, 0)
            try:
                asked.connect(reachable(endpoint, host))
            except zmq.ZMQError as error:
                raise EngineUnfit(
                    f"replays can't be asked for at {endpoint!r} ({error}); give --replay the `replay_endpoint` of the "
                    "engine's --kv-events-config, such as tcp://*:5558"
                ) from None
            await asked.send_multipart([b"", start.to_bytes(_SEQUENCE_BYTES, "big")])
            plain: zmq.Socket[bytes] = zmq.Socket.shadow(asked)
            while await asked.poll(seconds * 1000):
                with suppress(zmq.Again):
                    for _ in range(READ_BATCHES):
                        frames = plain.recv_multipart(zmq.NOBLOCK)
                        body = frames[1:] if frames and not frames[0] else frames
                        batch = _numbered(body)
                        if batch is None or batch[0] < 0:
                            return answers, batch is not None or not any(body)
                        answers.append(batch)
            return answers, False
        finally:
            asked.close()
