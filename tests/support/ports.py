"""Ports that are a test's own: no other worker, no other run and no outgoing connection takes one before it is used."""

from __future__ import annotations

import os
import random
import socket
from collections import deque

RANGE = (20_000, 32_000)
"""Outside of the range for outgoing connections: who connects again and again to a port of that range, while nobody listens
there, ends up connected to itself and keeps it."""
HELD = 400
"""So many ports are held at once; by then the oldest are in use or of tests that are over."""

_held: deque[int] = deque()
_draw = random.Random(os.urandom(8))


def free_port() -> int:
    """A TCP port that nobody listens on, held until long after the test.

    It stays bound and does not listen: connections are refused, whoever looks for a free port is refused as well, and a
    server that says SO_REUSEADDR, as servers do, may listen on it, again and again.
    """
    while True:
        port = _draw.randrange(*RANGE)
        with socket.socket() as holder:
            try:
                holder.bind(("", port))
            except OSError:
                continue
            # Only now: with it, the bind would have gone well on a port that another holds.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held.append(holder.detach())
        while len(_held) > HELD:
            os.close(_held.popleft())
        return port
