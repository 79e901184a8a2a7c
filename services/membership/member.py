"""One node's membership: what an engine's adapter and a simulated node do alike to be a node of the fleet.

What they do about a conclusion is theirs: this one only says that there is one.
"""

from __future__ import annotations

from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog
from nats.errors import Error as NatsError

from kvplane.events import codec
from kvplane.events.errors import BadCommit
from kvplane.events.log.client import check_open
from kvplane.events.subjects import heartbeat_subject, subject, token
from kvplane.events.types import NodeLost, NodeRecovered, NodeRegistered, NodeRemoved
from kvplane.services.membership.leaving import LEAVE_SECONDS, leave
from kvplane.services.protocol import labels, messages
from kvplane.services.protocol.answers import RegisterAnswer
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg

REGISTER_SECONDS = 0.5
"""Pause before a registration is tried again."""

_log = structlog.get_logger("kvplane.membership")
encode_heartbeat = msgspec.msgpack.Encoder().encode


class Conclusion(Enum):
    """What the log says of a node."""

    FORGOTTEN = "its blocks are forgotten and must be told again: it was lost, or is back"
    REMOVED = "it was removed from the fleet"
    TAKEN = "it was registered by someone else"


def conclusions(body: bytes, writer: str) -> list[Conclusion]:
    """What a commit about the node says to the one who registered it with this label `ADAPTER`. Pure."""
    try:
        events = codec.decode_body("node", body)
    except BadCommit:
        return []
    found = []
    for event in events:
        if isinstance(event, NodeLost | NodeRecovered):
            found.append(Conclusion.FORGOTTEN)
        elif isinstance(event, NodeRemoved):
            found.append(Conclusion.REMOVED)
        elif isinstance(event, NodeRegistered) and event.labels.get(labels.ADAPTER, "") != writer:
            found.append(Conclusion.TAKEN)
    return found


class Member:
    """A node of a fleet, as itself.

    `concluded` is called in the event loop with each conclusion about it. `writer` is the label `ADAPTER` of its
    registrations, if they have one.
    """

    def __init__(
        self, client: Client, fleet: str, node: str, concluded: Callable[[Conclusion], object], *, writer: str = ""
    ) -> None:  # fmt: skip
        self.epoch = 0
        """That of the last registration; 0 before the first."""
        self.registrations = 0
        self.format = 1
        """The log's format, as far as that is known."""
        self._client, self._fleet, self._node = client, fleet, node
        self._writer = writer
        self._concluded = concluded

    def coordinator(self, what: str) -> str:
        """Where this node asks for something for itself."""
        return f"kv.{self._fleet}.coordinator.{what}.{token(self._node)}"

    async def listen(self) -> None:
        """Hear conclusions from now on."""
        await self._client.subscribe(subject(self._fleet, "node", self._node), cb=self._hear)

    async def _hear(self, message: Msg) -> None:
        self._conclude(message.data)

    def _conclude(self, body: bytes) -> None:
        for conclusion in conclusions(body, self._writer):
            self._concluded(conclusion)

    async def register(self, request: messages.RegisterRequest, failed: Callable[[ServiceFault], object]) -> int:
        """Ask to be registered until it succeeds; the new epoch. `failed` is called with every no, and may raise it."""
        while True:
            try:
                answer = await ask(self._client, self.coordinator("node.register"), request, RegisterAnswer)
            except ServiceFault as error:
                failed(error)
                await anyio.sleep(REGISTER_SECONDS)
            else:
                self.epoch, self.format = answer.epoch, answer.format
                self.registrations += 1
                return answer.epoch

    async def log_takes(self, wanted: int) -> bool:
        """Ask whether the log is in this format by now, or in a later one; no is also the answer when nobody answers."""
        with suppress(ServiceFault):
            request = messages.NodeRequest(node=self._node)
            self.format = (await ask(self._client, self.coordinator("node.last"), request, messages.NodeLast)).format
        return self.format >= wanted

    async def heartbeat(self, gauges: Callable[[], messages.Heartbeat | None], seconds: float) -> None:
        """Heartbeat at this interval, for ever, unless there is nothing to be said. Raises `LoginRefused`."""
        where = heartbeat_subject(self._fleet, self._node)
        while True:
            check_open(self._client)
            heartbeat = gauges()
            if heartbeat is not None:
                with suppress(NatsError, OSError):
                    await self._client.publish(where, encode_heartbeat(heartbeat))
            await anyio.sleep(seconds)

    async def check(self) -> None:
        """After every loss of the connection, ask what happened to the node while it could not be heard; for ever."""
        asked = self._client.stats["reconnects"]
        while True:
            await anyio.sleep(REGISTER_SECONDS)
            reconnects = self._client.stats["reconnects"]
            if reconnects == asked or not self._client.is_connected:
                continue
            try:
                request = messages.NodeRequest(node=self._node)
                last = await ask(self._client, self.coordinator("node.last"), request, messages.NodeLast)
            except ServiceFault as error:
                _log.info("node_not_checked", node=self._node, error=str(error))
                continue
            asked = reconnects
            if last.sequence > self.epoch:
                self._conclude(last.body)

    async def leave(self, reason: str, *, seconds: float = LEAVE_SECONDS) -> None:
        """Tell the fleet that the node leaves, if it has ever joined, for so long at the most. Raises nothing."""
        if self.epoch:
            await leave(self._client, self._fleet, self._node, self.epoch, reason, seconds=seconds)
