"""Work on a copy of this process's memory, while this process goes on.

A snapshot of a large state takes seconds to write down. A forked child has the state as it was at the fork, for the time
that the fork takes: milliseconds a gigabyte.
"""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread

from services.errors import WorkerDied

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_BYTES = 1 << 20


class Copied(NamedTuple):
    """What a function gave, and for how many seconds the fork stopped this process."""

    data: bytes
    pause: float


async def in_copy(function: Callable[[], bytes]) -> Copied:
    """Call a function in a forked copy of this process. Raises `WorkerDied`.

    The function may compute and nothing else: no locks, no threads, no input or output.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The child calls one pure function and leaves; what other threads hold does not concern it.
        warnings.simplefilter("ignore", DeprecationWarning)
        begin = time.monotonic()
        child = os.fork()
    if not child:
        _child(function, writing)
    pause = time.monotonic() - begin
    os.close(writing)
    done = False
    try:
        parts: list[bytes] = []
        while True:
            await anyio.wait_readable(reading)
            part = os.read(reading, _READ_BYTES)
            if not part:
                break
            parts.append(part)
        done = True
    finally:
        os.close(reading)
        if not done:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
    if status:
        raise WorkerDied(
            f"the process that wrote it down ended with status {status}; is there memory for a second one?"
        )
    return Copied(b"".join(parts), pause)


def _child(function: Callable[[], bytes], writing: int) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        gc.disable()
        data = memoryview(function())
        while data:
            data = data[os.write(writing, data) :]
        code = 0
    finally:
        os._exit(code)
