"""Worker processes that leave no trace: not when they are interrupted, nor when the one who wants the results is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from services.errors import NotServed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTEXT = multiprocessing.get_context("spawn")


def _start(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    """Leave when the process that wants the results was killed; nobody else would end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def workers(
    count: int, begin: Callable[..., None] | None = None, *arguments: Any  # noqa: ANN401 - passed through
) -> Iterator[Callable[..., Future[Any]]]:  # fmt: skip
    """Start processes, each of which calls `begin` first; gives what submits a call to them.

    Raises `NotServed` when a process dies before its work is done.
    """
    others = multiprocessing.active_children()
    executor = ProcessPoolExecutor(count, CONTEXT, _start, (begin, arguments))

    def submit(*call: Any) -> Future[Any]:  # noqa: ANN401 - passed through
        # A terminal's Ctrl-C is for this process; those that are started now inherit that they don't hear of it.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return executor.submit(*call)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    try:
        yield submit
    except BaseException as error:
        # Nobody waits for the other runs any more.
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise NotServed("a process died before its run was done; is there memory for all of them?") from None
        raise
    finally:
        executor.shutdown(cancel_futures=True)
