"""Sockets that listen, and how one of them stops without sending anybody away who has connected already."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvplane.services.protocol.errors import HttpFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKLOG = 4096
_SO_ATTACH_FILTER = 26
_FLAGS, _SYN = 13, 2
_NO_BEGINNINGS = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, _FLAGS),  # the byte of TCP's flags
        (0x45, 0, 1, _SYN),  # is this the first segment of a connection?
        (0x06, 0, 0, 0),  # then drop it
        (0x06, 0, 0, 0xFFFFFFFF),  # else take it whole
    )
)
"""A filter of the kernel's (classic BPF)."""


def bound(host: str, port: int, *, share: bool = False, listen: bool = True) -> socket.socket:
    """A socket at an address, for a server to listen on; an empty host is every address.

    With `share` other processes of this user may listen at the same port: connections go to those that `listen`. Raises
    `HttpFailed`.
    """
    try:
        return bind(host, port, share=share, listen=listen)
    except OSError as error:
        where = f"{host or '*'}:{port}"
        raise HttpFailed(
            f"HTTP can't be served at {where} ({error.strerror or error}); choose another address"
        ) from None


def bind(host: str, port: int, *, share: bool = False, listen: bool = True) -> socket.socket:
    """As `bound`, for those who say themselves what failed. Raises `OSError`."""
    family, kind, _, _, at = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]  # fmt: skip
    with _made(family, kind) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(at)
        if listen:
            # Else another could be bound to the same address until this one listens.
            made.listen(BACKLOG)
    return made


def bind_path(path: str) -> socket.socket:
    """A socket in the file system, where nothing is yet or a former process left one. Raises `OSError`."""
    with _made(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        Path(path).unlink(missing_ok=True)
        made.bind(path)
    return made


@contextmanager
def _made(family: int, kind: int) -> Iterator[socket.socket]:
    """A socket, closed again if what is done with it in the block fails; afterwards it does not block."""
    made = socket.socket(family, kind)
    try:
        yield made
    except OSError:
        made.close()
        raise
    made.setblocking(False)  # noqa: FBT003 - as sockets have it


def take_no_more(listener: socket.socket) -> None:
    """Have the kernel ignore who begins to connect, where it can; those who have begun are still taken.

    A socket that is closed resets what is waiting to be accepted, and there is always somebody while many connect. Who is
    ignored tries again after a second and is refused then, so that a load balancer takes another server.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(_NO_BEGINNINGS)
    filter_of = struct.pack("HL", len(_NO_BEGINNINGS) // 8, ctypes.addressof(program))
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_of)
