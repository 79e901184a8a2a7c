"""The process that confined ones are forked from: it has loaded what they need, and holds nothing else.

To fork the service itself would give each of them a copy of its threads' locks and its memory. This one has no
threads that anything waits for, so a fork of it is a whole process, within milliseconds. It ends, and all that it forked ends,
when the service is gone.

The service sends `Start` with two descriptors, the first for messages, the second for the exit status; and `Kill`.
"""

from __future__ import annotations

import importlib
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

import msgspec
from msgspec import Struct

CONTROL_BYTES = 1 << 16
FAILED = 70
"""Exit status of a child that raised."""
NO_MEMORY = 71
"""Exit status of a child that noticed that it has no memory left."""


class Start(Struct, frozen=True, tag=True):
    """Fork a child. `work` is `module:function`, called with what `function` takes; limits are bytes and seconds."""

    number: int
    work: str
    memory: int
    cpu: float


class Kill(Struct, frozen=True, tag=True):
    """End a child."""

    number: int


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Start | Kill).decode


def command(control: int, modules: tuple[str, ...]) -> list[str]:
    """The command line of a server that reads from this descriptor."""
    call = f"from {__name__} import serve; serve({control}, {modules!r})"
    return [sys.executable, "-P", "-c", call]


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, tuple[int, int]] = {}
        """Number and the descriptor for the end, of each process."""

    def run(self) -> None:
        waking, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(waking, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is not self._control:
                        os.read(waking, 64)
                        self._reap()
                    elif not self._take():
                        return

    def _take(self) -> bool:
        data, given, _, _ = socket.recv_fds(self._control, CONTROL_BYTES, 2)
        if not data:
            return False
        message = _decode(data)
        if isinstance(message, Kill):
            for process, (number, _) in self._children.items():
                if number == message.number:
                    os.kill(process, signal.SIGKILL)
            return True
        talking, ending = given
        process = os.fork()
        if not process:
            _be(message, talking)
        os.close(talking)
        self._children[process] = (message.number, ending)
        return True

    def _reap(self) -> None:
        while self._children:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            _, ending = self._children.pop(process)
            with suppress(OSError):
                os.write(ending, os.waitstatus_to_exitcode(status).to_bytes(2, "little", signed=True))
            os.close(ending)

    def end(self) -> None:
        for process in self._children:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _be(start: Start, talking: int) -> NoReturn:
    """Be the child."""
    status = FAILED
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.closerange(3, talking)
        os.closerange(talking + 1, os.sysconf("SC_OPEN_MAX"))
        module, _, name = start.work.partition(":")
        work = getattr(importlib.import_module(module), name)
        work(talking, start.memory, start.cpu)
        status = 0
    except MemoryError:
        status = NO_MEMORY
    finally:
        os._exit(status)


def serve(control: int, modules: tuple[str, ...]) -> None:
    """Fork on demand until the other side of the descriptor is gone."""
    for name in modules:
        importlib.import_module(name)
    server = _Server(socket.socket(fileno=control))
    try:
        server.run()
    finally:
        server.end()
