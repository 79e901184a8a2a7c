"""Worker processes that leave no trace: not when they are interrupted, nor when the one who wants the results is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread

from kvplane.services.protocol.errors import NotServed, WorkerDied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

POLL_SECONDS = 0.2
"""How often progress is looked at."""
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
def without_interrupts() -> Iterator[None]:
    """A terminal's Ctrl-C is for this process; those that are started in the block inherit that SIGINT is blocked.

    An interrupt waits for the end of the block: a worker that was half started would read the end of its orders, and complain.
    """
    arrived: list[tuple[Any, ...]] = []
    handler = signal.getsignal(signal.SIGINT)
    # Whichever thread the signal reaches, its handler runs in the main one.
    deferred = threading.current_thread() is threading.main_thread() and callable(handler)
    if deferred:
        signal.signal(signal.SIGINT, lambda *given: arrived.append(given))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if deferred:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if arrived and callable(handler):
            handler(*arrived[-1])


def _submit(executor: ProcessPoolExecutor, *call: Any) -> Future[Any]:  # noqa: ANN401 - passed through
    with without_interrupts():
        return executor.submit(*call)


async def beside(function: Callable[..., object], *arguments: object, patience: float) -> int | None:
    """Call a function in a process of its own until it ends; its exit code.

    Cancelled, the process is asked to end (SIGTERM), and killed when it has not after `patience` seconds. It ends as well
    when this process is killed.
    """
    process = CONTEXT.Process(target=_called, args=(function, *arguments))
    with without_interrupts():
        process.start()
    try:
        await anyio.to_thread.run_sync(process.join, abandon_on_cancel=True)
    finally:
        with anyio.CancelScope(shield=True):
            if process.is_alive():
                process.terminate()
                await anyio.to_thread.run_sync(process.join, patience)
            if process.is_alive():
                process.kill()
    return process.exitcode


def _called(function: Callable[..., object], *arguments: object) -> None:
    _start(None, ())
    function(*arguments)


class Worker:
    """A process that works for a service, one call at a time; started at the first call, and anew when it died.

    It calls `begin` first.
    """

    def __init__(self, begin: Callable[..., None] | None = None, *arguments: object) -> None:
        self._begin = (begin, arguments)
        self._executor: ProcessPoolExecutor | None = None
        self._turn = anyio.CapacityLimiter(1)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function there. Raises what it raises, and `WorkerDied`."""
        return await anyio.to_thread.run_sync(self._call, function, *arguments, limiter=self._turn)

    def _call(self, function: Callable[..., T], *arguments: object) -> T:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, CONTEXT, _start, self._begin)
        try:
            result: T = _submit(self._executor, function, *arguments).result()
        except BrokenProcessPool:
            self._executor = None
            raise WorkerDied("the process that worked on it died; is there memory for another state?") from None
        return result

    def close(self) -> None:
        """End the process, whatever it does."""
        executor, self._executor = self._executor, None
        if executor is not None:
            for process in list((executor._processes or {}).values()):  # noqa: SLF001 - a call can't be taken back
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)


def results(jobs: Sequence[Future[T]], look: Callable[[], None] = lambda: None) -> list[T]:
    """What the jobs gave, in their order; `look` is called every `POLL_SECONDS` meanwhile, and at the end."""
    waiting = list(jobs)
    while waiting:
        waiting = list(wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION).not_done)
        for job in jobs:
            if job.done() and job.exception() is not None:
                job.result()
        look()
    return [job.result() for job in jobs]


@contextmanager
def workers(
    count: int, begin: Callable[..., None] | None = None, *arguments: Any  # noqa: ANN401 - passed through
) -> Iterator[Callable[..., Future[Any]]]:  # fmt: skip
    """Start processes, each of which calls `begin` first; gives what submits a call to them.

    Raises `NotServed` when a process dies before its work is done.
    """
    others = multiprocessing.active_children()
    executor = ProcessPoolExecutor(count, CONTEXT, _start, (begin, arguments))
    try:
        yield partial(_submit, executor)
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
