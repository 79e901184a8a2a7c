"""Who publishes at one endpoint: how many are connected, and whether what arrives is of one engine.

Two engines at one endpoint would be taken for one, whose cache is a mixture. Topics that take turns on a connection, or
publishers that do while both are connected, show it.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvplane.services.protocol.errors import EngineUnfit

_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip
EVENTS = _CONNECTED | _FAILED | zmq.EVENT_DISCONNECTED
"""What is to be heard of a socket."""


class Publishers:
    """The publishers of one socket."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.connections = 0
        """How often one has connected."""
        self.live = 0
        """How many are connected now."""
        self._strangers = 0
        """Those that spoke another protocol, and whose end is still to be heard."""
        self._topics: list[bytes] = []
        """Those that were heard since one has connected, in the order in which they came first."""
        self._turns: list[int] = []
        """Connections that were heard, one after the other, by their file descriptors."""

    def look(self, monitor: zmq.Socket[bytes]) -> None:
        """Read what the socket's monitor has."""
        with suppress(zmq.Again):
            while True:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"]
                if event == _CONNECTED:
                    self.connections += 1
                    self.live += 1
                    self._topics = []
                elif event == zmq.EVENT_DISCONNECTED:
                    if self._strangers:
                        self._strangers -= 1
                    else:
                        self.live = max(0, self.live - 1)
                    # A file descriptor may be another connection's now.
                    self._turns = []
                else:
                    self._strangers += 1

    def heard(self, topic: bytes, monitor: zmq.Socket[bytes]) -> None:
        """A message came with this topic. Raises `EngineUnfit` when two topics take turns on the same connection.

        One after another is a publisher's next life, and a last message of the former one may come late.
        """
        if self._topics and self._topics[-1] == topic:
            return
        # Its publisher may have connected a moment ago.
        self.look(monitor)
        if topic in self._topics:
            raise EngineUnfit(
                f"two engines publish at {self.endpoint}: one as {_shown(topic)}, one as {_shown(self._topics[-1])}; give each "
                "an endpoint and an adapter of its own"
            )
        self._topics.append(topic)

    def turn(self, frame: zmq.Frame) -> None:
        """A message came by this connection. Raises `EngineUnfit` when two of them take turns."""
        try:
            connection = int(frame.get(zmq.SRCFD))
        except (zmq.ZMQError, ValueError, TypeError):
            return
        if self._turns and self._turns[-1] == connection:
            return
        if connection in self._turns:
            one, two = _address(connection), _address(self._turns[-1])
            raise EngineUnfit(
                f"two engines connect to {self.endpoint}, from {one} and from {two}; give each an endpoint and an adapter "
                "of its own"
            )
        self._turns.append(connection)


def _shown(topic: bytes) -> str:
    return repr(topic[:80].decode(errors="replace"))


def _address(connection: int) -> str:
    """Where a connection comes from."""
    try:
        with socket.socket(fileno=os.dup(connection)) as copy:
            host, port = copy.getpeername()[:2]
    except (OSError, ValueError):
        return "somewhere"
    return f"{host}:{port}"
