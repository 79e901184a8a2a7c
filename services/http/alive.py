"""Connections whose other side is gone without a word are found out by the kernel, not after the last time-out."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

QUIET_SECONDS, BETWEEN_SECONDS, PROBES = 15, 5, 3
"""After so long without a word the other side is probed; after so many probes that it does not answer it is gone."""

_OPTIONS = [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", QUIET_SECONDS), ("TCP_KEEPINTVL", BETWEEN_SECONDS), ("TCP_KEEPCNT", PROBES))
    if hasattr(socket, name)
]


def watch(transport: asyncio.Transport) -> None:
    """Have a connection's other side probed while it is quiet."""
    connection = transport.get_extra_info("socket")
    if connection is None:
        return
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for level, option, value in _OPTIONS:
            connection.setsockopt(level, option, value)
