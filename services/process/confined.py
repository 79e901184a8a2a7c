"""A process that can be killed: its memory, and the time of each thing that it does, are limited by the system.

What a question costs can't be told from its words, so it runs where the kernel stops it. Such a process takes milliseconds to
start (`forkserver`), ends when the one who asked is gone, and is the first that the kernel takes when the machine has no memory
left. Both sides exchange messages of bytes. One that is ended shows as `Killed`, with the reason.
"""

from __future__ import annotations

import atexit
import math
import os
import resource
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread

from kvplane.services.process.forkserver import FAILED, Kill, Start, command, encode
from kvplane.services.process.workers import without_interrupts
from kvplane.services.protocol.errors import ServiceFault, WorkerDied

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Libraries start no threads of theirs as they are loaded, which a fork would not have."""
CLOSE_SECONDS = 5.0
"""So long the process that others are forked from has to end; then it is killed."""
GRACE_SECONDS = 1.0
"""So long after its time a process has to say so itself; then the system ends it."""
_PATIENCE_SECONDS = 3.0
"""One that its own alarm has not ended so long after that is killed by the one who asked."""
_LENGTH_BYTES = 8
_READ_BYTES = 1 << 18

Reason = Literal["time", "memory"]


class Killed(WorkerDied):
    """A confined process ended before it answered. `reason` is what it had too little of."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"the process that worked on it was ended: it needed more {reason} than it may have")
        self.reason = reason


class Within:
    """In a confined process: what is said to it, and its answers."""

    def __init__(self, talking: int, memory: int, cpu: float) -> None:
        self._socket = socket.socket(fileno=talking)
        for each in (signal.SIGALRM, signal.SIGXCPU):
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGXCPU})
        # Refused where the system does not have it; the limits hold all the same.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        resource.setrlimit(resource.RLIMIT_DATA, (_data() + memory,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(cpu),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def receive(self) -> bytes:
        """The next message. Ends the process when the other side is gone."""
        try:
            return self._exactly(int.from_bytes(self._exactly(_LENGTH_BYTES), "little"))
        except OSError:
            os._exit(0)

    def _exactly(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                os._exit(0)
            view = view[got:]
        return bytes(data)

    def send(self, data: bytes) -> None:
        """Answer."""
        try:
            self._socket.sendall(len(data).to_bytes(_LENGTH_BYTES, "little"))
            self._socket.sendall(data)
        except OSError:
            os._exit(0)

    @staticmethod
    def allow(seconds: float) -> None:
        """Have this process ended in so many seconds and a little more, whatever it does then; never with infinity."""
        signal.setitimer(signal.ITIMER_REAL, 0 if seconds == math.inf else max(seconds, 0) + GRACE_SECONDS)


def _data() -> int:
    """Bytes of memory that count for `RLIMIT_DATA` already."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


class Forkserver:
    """What confined processes are forked from; started with the first one, and anew when it was killed."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._numbers = count(1)

    def start(self, work: str, *, memory: int, cpu: float) -> Confined:
        """A process that calls `work` (`module:function`) with what `Within` takes. Raises `WorkerDied`.

        `memory` is in bytes, beyond what it begins with; `cpu` in seconds.
        """
        ours, theirs = socket.socketpair()
        ending, ended = os.pipe()
        number = next(self._numbers)
        request = encode(Start(number, work, memory, cpu))
        try:
            with self._lock:
                control = self._running()
            socket.send_fds(control, [request], [theirs.fileno(), ended])
        except OSError as error:
            ours.close()
            os.close(ending)
            raise WorkerDied(f"no process could be started for it: {error}") from error
        finally:
            theirs.close()
            os.close(ended)
        return Confined(self, number, ours, ending)

    def _running(self) -> socket.socket:
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        if self._control is not None:
            self._control.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, without_interrupts():
            self._process = subprocess.Popen(  # noqa: S603 - its own interpreter
                command(theirs.fileno(), self._modules),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ONE_THREAD},
            )
        if self._control is None:
            atexit.register(self.close)
        self._control = ours
        return ours

    def close(self) -> None:
        """End it, and all that was forked from it."""
        with self._lock:
            if self._control is not None:
                # A fork of this process may have the socket as well, and would keep it open.
                with suppress(OSError):
                    self._control.shutdown(socket.SHUT_RDWR)
                self._control.close()
            if self._process is not None:
                try:
                    self._process.wait(CLOSE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            self._control = self._process = None

    def kill(self, number: int) -> None:
        """End a process, if it has not ended."""
        with self._lock, suppress(OSError):
            if self._control is not None:
                self._control.send(encode(Kill(number)))


class Confined:
    """A confined process as the one who started it sees it. `close` must be called at the end."""

    def __init__(self, server: Forkserver, number: int, talking: socket.socket, ending: int) -> None:
        self._server = server
        self._number = number
        self._socket = talking
        self._socket.setblocking(False)  # noqa: FBT003
        self._ending = ending
        self._closed = False

    async def call(self, data: bytes, seconds: float) -> bytes:
        """Say something to it, and wait for the answer. Raises as `answer` does."""
        try:
            await self._send(data)
        except OSError:
            raise await self._why() from None
        return await self.answer(seconds)

    async def _send(self, data: bytes) -> None:
        view = memoryview(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)

    async def answer(self, seconds: float) -> bytes:
        """Wait for what it says next. Raises `Killed` when it ends before that, or says nothing in `seconds` and a while."""
        with anyio.move_on_after(seconds + GRACE_SECONDS + _PATIENCE_SECONDS):
            try:
                return await self._exactly(int.from_bytes(await self._exactly(_LENGTH_BYTES), "little"))
            except (EOFError, OSError):
                raise await self._why() from None
        raise Killed("time")

    async def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = self._socket.recv(min(length - len(data), _READ_BYTES))
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    async def _why(self) -> ServiceFault:
        status = b""
        with anyio.move_on_after(_PATIENCE_SECONDS):
            await anyio.wait_readable(self._ending)
            status = os.read(self._ending, 2)
        code = int.from_bytes(status, "little", signed=True)
        if code in {-signal.SIGALRM, -signal.SIGXCPU}:
            return Killed("time")
        if code == FAILED or not code:
            return WorkerDied("the process that worked on it failed; see the log")
        return Killed("memory")

    def kill(self) -> None:
        """End it, whatever it does. Who waits for its answer is told."""
        if not self._closed:
            self._server.kill(self._number)

    def close(self) -> None:
        """End it and let it go, when nobody waits for its answer any more. Twice is once."""
        if not self._closed:
            self.kill()
            self._closed = True
            self._socket.close()
            os.close(self._ending)
