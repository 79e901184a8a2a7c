"""Processes of the command line without the half second that their imports take: forks of one that has imported them.

Each process of tests has one fork server. It is handed words, environment and descriptors, forks twice and lets go: the
process in the middle ends, and the one that remains becomes a child of the tests, to whom all orphans of theirs go. So it is
waited for, signalled and killed like any other; it shares nothing with the tests. What a test says of the start itself
(imports, the first quarter second, memory, tunables) is asked of `sys.executable`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pkgutil
import runpy
import socket
import subprocess
import sys
import threading
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import anyio

if TYPE_CHECKING:
    import signal
    from collections.abc import Mapping, Sequence
    from types import TracebackType

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1 << 18
"""Of one order: words and environment."""
_PR_SET_CHILD_SUBREAPER = 36


class Order(NamedTuple):
    """What a new process shall be."""

    program: str
    words: list[str]
    environment: dict[str, str]
    folder: str
    session: bool


class _Server:
    """The fork server of this process, from the first order on."""

    def __init__(self) -> None:
        if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError("the processes that tests start can't become their children")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._one = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                cwd=ROOT,
                # Threads do not survive a fork.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def start(self, order: Order, descriptors: Sequence[int]) -> int:
        """The new process, in a session of its own where that is asked."""
        with self._one:
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
            answer = self._socket.recv(64)
        if not answer:
            raise OSError("the fork server has ended")
        return int(answer)


@cache
def _server() -> _Server:
    return _Server()


class Program(subprocess.Popen[Any]):
    """`subprocess.Popen`, forked where it can be: for `sys.executable -m kvplane ...` without more wishes."""

    def _execute_child(self, *arguments: Any) -> None:
        (
            args, executable, preexec, _, pass_fds, cwd, env, _, _, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, gid, gids, uid, umask, session, process_group,
        ) = arguments  # fmt: skip
        environment = dict(os.environ if env is None else env)
        # What Python itself reads as it starts.
        python = any(
            environment.get(name) != os.environ.get(name)
            for name in {*environment, *os.environ}
            if name.startswith("PYTHON")
        )
        wishes = (executable, preexec, pass_fds, shell, gid, gids, uid, python)
        if (
            any(wishes)
            or umask >= 0
            or process_group not in {None, -1}
            or args[:3] != [sys.executable, "-m", "kvplane"]
        ):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        # A service that begins again with huge pages would import everything anew.
        environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
        order = Order(args[2], list(args[3:]), environment, os.fspath(cwd or Path.cwd()), session)
        standard = [given if given != -1 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _server().start(order, standard)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


class AsyncProgram:
    """The part of `anyio.abc.Process` that needs no streams."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.pid = program.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the negative number of the signal that killed it; nothing while it runs."""
        return self._program.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        self._program.send_signal(number)

    def terminate(self) -> None:
        """SIGTERM."""
        self._program.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._program.kill()

    async def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        if self._program.poll() is None:
            ended = os.pidfd_open(self.pid)
            try:
                await anyio.wait_readable(ended)
            finally:
                os.close(ended)
        return self._program.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        with anyio.CancelScope(shield=True):
            await self.wait()


async def open_program(
    command: Sequence[str], *, stdin: int | None = subprocess.DEVNULL, stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None,
    start_new_session: bool = False,
) -> AsyncProgram:  # fmt: skip
    """Start a program as `anyio.open_process` does; its streams are files or descriptors."""
    return AsyncProgram(
        Program(
            list(command),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            start_new_session=start_new_session,
        )
    )


def _serve(orders: socket.socket) -> tuple[Order, list[int]]:
    """Fork for each order; returns in the forks, and ends when nobody is left who gives orders."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, MOST_BYTES, 3)
        if not data:
            os._exit(0)
        order = Order(*json.loads(data))
        reading, writing = os.pipe()
        between = _fork()
        if not between:
            if _fork():
                os._exit(0)
            if order.session:
                os.setsid()
            os.write(writing, str(os.getpid()).encode())
            os.close(reading)
            os.close(writing)
            orders.close()
            return order, descriptors
        os.close(writing)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(between, 0)
        orders.send(os.read(reading, 64))
        os.close(reading)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(order: Order, descriptors: list[int]) -> None:
    """Run the program as its interpreter would."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        if descriptor > 2:
            os.close(descriptor)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    sys.argv[1:] = order.words
    sys.orig_argv[:] = [sys.executable, "-m", order.program, *order.words]
    runpy.run_module(order.program, run_name="__main__", alter_sys=True)


def main(orders: int) -> None:
    """The fork server's life, and then that of each process that it becomes."""
    for package in ("kvplane.events", "kvplane.projections", "kvplane.services"):
        for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                import_module(module.name)
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    # jemalloc starts its own again after a fork.
    if len([name for name in names if name != "jemalloc_bg_thd"]) > 1:
        raise RuntimeError(f"an import started threads, which a fork loses: {names}")
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=orders) as given:
        order, descriptors = _serve(given)
    _become(order, descriptors)


if __name__ == "__main__":
    main(int(sys.argv[1]))
