"""Work on a copy of this process's memory, while this process goes on.

A snapshot or a digest of a large state takes seconds. A forked child has the state as it was at the fork, for the time
that the fork takes: milliseconds a gigabyte.
"""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread

from kvplane.events.errors import KvplaneError
from kvplane.services.protocol.errors import WorkerDied

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 1 << 18
"""How much is read at once: the event loop waits for so long as its copy takes."""
NICENESS = 10
_REFUSED = 3
"""Exit status of a copy that gives a sentence instead: why there is no result."""


class Copied(NamedTuple):
    """What a function gave, to be read from its beginning, and for how many seconds the fork stopped this process."""

    data: BytesIO
    pause: float


class Copy:
    """A forked copy of this process, made at once, in which a function is called. Raises `OSError` when there is no room.

    The function may compute and nothing else: no locks, no threads, no input or output. `result` must be awaited.
    """

    def __init__(self, function: Callable[[], bytes]) -> None:
        self._reading, writing = os.pipe()
        try:
            with warnings.catch_warnings():
                # The child calls one pure function and leaves; what other threads hold does not concern it.
                warnings.simplefilter("ignore", DeprecationWarning)
                begin = time.monotonic()
                self._child = os.fork()
            if not self._child:
                _child(function, writing)
            self.pause = time.monotonic() - begin
        except BaseException:
            os.close(self._reading)
            raise
        finally:
            os.close(writing)

    async def result(self) -> Copied:
        """What the function gave. Raises `WorkerDied`; when it is cancelled the copy ends."""
        # Grows in place: joining parts would copy all of it at once.
        data = BytesIO()
        done = False
        try:
            while True:
                await anyio.wait_readable(self._reading)
                part = os.read(self._reading, READ_BYTES)
                if not part:
                    break
                data.write(part)
            done = True
        finally:
            os.close(self._reading)
            if not done:
                with suppress(ProcessLookupError):
                    os.kill(self._child, signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                _, status = await anyio.to_thread.run_sync(os.waitpid, self._child, 0)
        if os.waitstatus_to_exitcode(status) == _REFUSED:
            raise WorkerDied(data.getvalue().decode(errors="replace"))
        if status:
            raise WorkerDied(
                f"the process that wrote it down ended with status {status}; is there memory for a second one?"
            )
        data.seek(0)
        return Copied(data, self.pause)


async def in_copy(function: Callable[[], bytes]) -> Copied:
    """Call a function in a forked copy of this process. Raises `WorkerDied`, or `OSError` when none can be made."""
    return await Copy(function).result()


def _child(function: Callable[[], bytes], writing: int) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        gc.disable()
        _leave_the_parents_things(writing)
        try:
            data, done = memoryview(function()), 0
        except KvplaneError as error:
            # Who waits for it shall know what is wrong.
            data, done = memoryview(str(error).encode()), _REFUSED
        while data:
            data = data[os.write(writing, data) :]
        code = done
    finally:
        os._exit(code)


def _leave_the_parents_things(keep: int) -> None:
    """Signals, files and connections are the parent's.

    A connection that were open here would stay open when the parent is killed, and requests would still be sent to it.
    """
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
    with suppress(OSError):
        os.nice(NICENESS)
