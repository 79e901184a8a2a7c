"""A consumer of one's own, and what the server delivers to it: in order, and nothing that others send to its inbox.

It is ephemeral, pushes, and takes no acknowledgements. Others may learn its inbox and its name, and send what they like
there: only what its own deliveries are is handed on, and only its own flow control is answered.
"""

from __future__ import annotations

import json
from contextlib import suppress
from random import SystemRandom
from time import perf_counter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import anyio.lowlevel
import structlog
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from kvplane.events.errors import LogError, LogUnavailable
from kvplane.events.log.client import LogClient
from kvplane.events.log.inboxes import CONSUMERS, consumer_names, delivery_inbox
from kvplane.events.log.servers import request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription
    from nats.js import JetStreamContext

LEAVE_SECONDS = 1.0
"""How long whoever leaves tries to tell the server so."""
SLICE_SECONDS = 0.002
"""After so long with what was delivered others in the event loop have a turn: a flood must not hold up who is asked."""
TURNS = 4
"""So many turns: a request is received, parsed, answered and sent in one each."""
INACTIVE_SECONDS = 30.0
"""So long the server keeps a consumer to which nobody listens."""
_TAKEN = {10013, 10148}
"""The server's codes for a consumer that is there already."""

_REMEDY = "give services keys of their own with `kvplane auth add ROLE NAME`"
_log = structlog.get_logger("kvplane.log")

# $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>, or with a domain and an account
# hash after ACK and a random token at the end (server ADR-15).
_SHORT, _LONG = 9, 12


def _base(parts: Sequence[str]) -> int:
    """Where the stream sequence is in the reply subject of a delivery. Raises `ValueError`."""
    if len(parts) not in (_SHORT, _LONG - 1, _LONG):
        raise ValueError(parts)
    return 5 if len(parts) == _SHORT else 7


def pending(reply: str) -> int:
    """How many messages were left to be delivered behind the one with this reply subject. Raises `ValueError`."""
    parts = reply.split(".")
    return int(parts[_base(parts) + 3])


class Gate:
    """Holds back what is delivered while it is shut; the server's flow control then holds back what is on its way."""

    def __init__(self) -> None:
        self.opened: anyio.Event | None = None
        """Set when it is opened again; none while it is open."""

    def shut(self) -> None:
        """Let nothing pass."""
        if self.opened is None:
            self.opened = anyio.Event()

    def open(self) -> None:
        """Let everything pass."""
        opened, self.opened = self.opened, None
        if opened is not None:
            opened.set()


class Deliveries:
    """One consumer of a stream. A broken one is closed and another is made.

    `take` gets sequence, time (nanoseconds since 1970) and message of every delivery, in the event loop, and must not wait.
    `broken` is called when a delivery is missing; after it nothing is handed on.
    """

    def __init__(
        self, client: Client, stream: str, kind: str, take: Callable[[int, int, Msg], object],
        broken: Callable[[], object], *, gate: Gate | None = None,
    ) -> None:  # fmt: skip
        self._key = client.key if isinstance(client, LogClient) else ""
        self._kind = kind
        self.name = ""
        """Name of the consumer, once it is made."""
        self.inbox = delivery_inbox(self._key) if self._key else client.new_inbox()
        self._client = client
        self._stream = stream
        self._take = take
        self._broken = broken
        self._gate = gate or Gate()
        self._subscription: Subscription | None = None
        self._ended = False
        self._delivered = 0
        self._activity = True
        self._spent = 0.0

    async def open(
        self, js: JetStreamContext, *, after: int, heartbeat: float, pending_bytes: int, subjects: list[str] | None = None
    ) -> int:  # fmt: skip
        """Make the consumer, of what comes after a sequence; `close` it whatever happens. How many messages are there for it.

        `heartbeat` in seconds; `pending_bytes` may wait in the client, and flow control keeps below it. Raises errors of NATS.
        """
        self._subscription = await self._client.subscribe(
            self.inbox, cb=self.receive, pending_msgs_limit=-1, pending_bytes_limit=pending_bytes
        )
        config = ConsumerConfig(
            deliver_subject=self.inbox,
            # Those who may make consumers of the whole log only have an API subject that names no filter: a list may be.
            filter_subjects=subjects,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=after + 1,
            ack_policy=AckPolicy.NONE,
            max_deliver=1,
            flow_control=True,
            idle_heartbeat=heartbeat,
            inactive_threshold=INACTIVE_SECONDS,
            mem_storage=True,
            num_replicas=1,
        )
        if not self._key:
            self.name = f"{self._kind}-{uuid4().hex}"
            return (await js.add_consumer(self._stream, config, name=self.name)).num_pending or 0
        # At random: processes that share a key know nothing of each other.
        for name in SystemRandom().sample(consumer_names(self._key), CONSUMERS):
            self.name = name
            made = await self._created(js, config)
            if made is not None:
                return int(made["num_pending"])
        self.name = ""
        _log.warning("consumer_names_taken", stream=self._stream, key=self._key, remedy=_REMEDY)
        raise LogUnavailable(
            f"all {CONSUMERS} consumers that {self._key} may have of {self._stream} are there; {_REMEDY}"
        )

    async def _created(self, js: JetStreamContext, config: ConsumerConfig) -> dict[str, Any] | None:
        """The consumer that was made; none when its name is taken. The client itself would change the one that has it."""
        asked = {"stream_name": self._stream, "config": config.evolve(name=self.name).as_dict(), "action": "create"}
        where = f"$JS.API.CONSUMER.CREATE.{self._stream}.{self.name}"
        answer = await request(self._client, where, json.dumps(asked).encode(), seconds=js._timeout)  # noqa: SLF001
        made: dict[str, Any] = json.loads(answer.data)
        error = made.get("error")
        if error is None:
            return made
        if error.get("err_code") in _TAKEN:
            return None
        raise APIError.from_error(error)

    async def close(self) -> None:
        """Listen no more. Raises nothing."""
        self._ended = True
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with anyio.move_on_after(LEAVE_SECONDS, shield=True), suppress(NatsError, OSError, LogError):
                await subscription.unsubscribe()
                if self._key and self.name:
                    # The server would keep its name from others for a while.
                    where = f"$JS.API.CONSUMER.DELETE.{self._stream}.{self.name}"
                    await request(self._client, where, b"", seconds=LEAVE_SECONDS)

    def activity(self) -> bool:
        """Whether the server sent anything since this was asked last."""
        activity, self._activity = self._activity, False
        return activity

    async def receive(self, message: Msg) -> None:
        """Take what came to the inbox."""
        while (opened := self._gate.opened) is not None:
            await opened.wait()
        if self._ended:
            return
        if not message.reply.startswith("$JS.ACK."):
            # Told by the reply, not by the headers: those of a message on the log are its writer's.
            await self._control(message)
            return
        parts = message.reply.split(".")
        try:
            base = _base(parts)
            sequence, delivery, time = int(parts[base]), int(parts[base + 1]), int(parts[base + 2])
        except ValueError:
            return
        if parts[base - 2] != self.name or parts[base - 3] != self._stream:
            # A stranger's consumer, of this log or another, that was aimed at this inbox.
            return
        self._activity = True
        if delivery != self._delivered + 1:
            self._break()
            return
        self._delivered = delivery
        begin = perf_counter()
        self._take(sequence, time, message)
        self._spent += perf_counter() - begin
        if self._spent > SLICE_SECONDS:
            # The client hands on all that it has without a turn for anybody else.
            self._spent = 0.0
            for _ in range(TURNS):
                await anyio.lowlevel.checkpoint()

    async def _control(self, message: Msg) -> None:
        """A heartbeat or a flow control request."""
        self._activity = True
        if message.reply:
            await self._answer(message.reply)
            return
        headers = message.headers or {}
        await self._answer(headers.get("Nats-Consumer-Stalled", ""))
        last = headers.get("Nats-Last-Consumer")
        if last is not None and last != str(self._delivered):
            self._break()

    async def _answer(self, subject: str) -> None:
        """Let the server go on. Anyone can send a request here, so no other subject is ever published to."""
        token = subject.removeprefix(f"$JS.FC.{self._stream}.{self.name}.")
        if token != subject and token and not set(token) & set(" \t\r\n.*>"):
            await self._client.publish(subject)

    def _break(self) -> None:
        self._ended = True
        self._broken()
