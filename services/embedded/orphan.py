"""No server outlives the process that started it, and none shares its folder with another.

A server inherits a lock on a file in its folder, which the kernel frees when it ends. One that still has it when the folder has
a new owner was left behind by an owner that was killed; it is ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import structlog

from kvplane.services.process.owner import lock
from kvplane.services.protocol.errors import FolderTaken

LOCK = "server.lock"
PID = "nats-server.pid"

PATIENCE_SECONDS = 5.0
"""So long an orphan may take to end in good order; then it is killed."""
LOOK_SECONDS = 0.02

_LAUNCH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks the kernel for SIGTERM when the parent ends (PR_SET_PDEATHSIG), which what is executed keeps."""

_log = structlog.get_logger("kvplane.server")


def ending_with_this(command: list[str]) -> list[str]:
    """The command of a process that ends with the thread that starts it, however that ends; on Linux, as it is elsewhere."""
    if not sys.platform.startswith("linux"):
        return command
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]


async def free_of_servers(data: Path, config: Path, instead: str) -> int:
    """End a server that an owner which was killed left in the folder; the lock for the next one to inherit.

    Raises `FolderTaken` when a server runs there that no owner of the folder started, and `OSError`.
    """
    terminated = killed = False
    begin = anyio.current_time()
    while True:
        try:
            descriptor, locks = lock(data / LOCK)
        except BlockingIOError:
            orphan = _running(data, config)
        else:
            orphan = _running(data, config)
            if orphan is None:
                return descriptor
            os.close(descriptor)
            if locks and not terminated:
                # It was started by hand, or by a kvplane that knew no locks and may be alive.
                raise FolderTaken(
                    f"folder {data} is in use by nats-server, process {orphan}: stop it first; or {instead}"
                )
        waited = anyio.current_time() - begin
        if orphan is not None and not terminated:
            terminated = True
            _log.warning("orphan_ended", pid=orphan, data=str(data), why="the process that started it was killed")
            _signal(orphan, signal.SIGTERM)
        elif orphan is not None and not killed and waited > PATIENCE_SECONDS:
            killed = True
            _signal(orphan, signal.SIGKILL)
        elif waited > 2 * PATIENCE_SECONDS:
            raise FolderTaken(
                f"another process has {data / LOCK} open (`fuser` says which): stop it first; or {instead}"
            )
        await anyio.sleep(LOOK_SECONDS)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _running(data: Path, config: Path) -> int | None:
    """Process of the server that runs with this configuration, if there is one."""
    try:
        pid = int((data / PID).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    # The file outlives a server that was killed, and another process may have its number.
    return pid if str(config) in _command(pid) else None


def _command(pid: int) -> str:
    if Path("/proc/self/cmdline").exists():
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return ""
    ps = shutil.which("ps")
    if ps is None:
        return ""
    return subprocess.run(  # noqa: S603 - a number
        [ps, "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
