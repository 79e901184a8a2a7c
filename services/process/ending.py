"""How a command ends that nobody wants any more: after Ctrl-C, or when the reader of its pipe has left, as `head` does.

It ends without Python's account of where it was.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from sys import UnraisableHookArgs

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
UNREAD = 0
"""Exit code when the reader has left: it had what it wanted."""


def interruptible() -> None:
    """From here on Ctrl-C is an exception, so that what was begun ends in good order. Before, it ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _unraisable


def uninterruptible() -> None:
    """What is left is the interpreter's own end: Ctrl-C ends the process at once again."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _unraisable(found: UnraisableHookArgs) -> None:
    """Ctrl-C in a place from which no exception gets out, such as a callback of the interpreter's: it would be lost."""
    if isinstance(found.exc_value, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(found)


def unwanted(error: BaseException) -> int | None:
    """Exit code when an error means that nobody wants the command any more; none when it means something else."""
    parts = list(_parts(error))
    if any(isinstance(part, KeyboardInterrupt) for part in parts):
        return INTERRUPTED
    if any(isinstance(part, BrokenPipeError) for part in parts) and _reader_left():
        return UNREAD
    return None


def no_room(error: BaseException) -> str | None:
    """Why what a command makes can't be written; none when an error means something else."""
    return next(
        (part.strerror for part in _parts(error) if isinstance(part, OSError) and part.errno in _NO_ROOM), None
    )  # fmt: skip


def _parts(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _parts(part)
    else:
        yield error


def _reader_left() -> bool:
    """Whether standard output or error is a pipe that nobody reads: a broken pipe may as well be a connection's."""
    looked = select.poll()
    for stream in (1, 2):
        looked.register(stream, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in looked.poll(0))


def flush() -> None:
    """Write out what waits. What can't be written, because the reader has left or the disk is full, is given up.

    Raises `OSError` when it is not because the reader has left.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            # The interpreter would try again, and complain, as it ends.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            if not isinstance(error, BrokenPipeError):
                raise
