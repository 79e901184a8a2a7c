"""Processes of the command line, their lives one after the other, and what their logs say of each."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING, Any

import anyio

from tests.support.fork_server import open_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.chaos.ledger import Ledger
    from tests.support.fork_server import AsyncProgram

READY = {"router_ready", "coordinator_ready", "historian_ready", "node_registered"}
STOP_SECONDS = 25.0
ROOT = Path(__file__).resolve().parents[2]
AGAIN_SECONDS = 0.5
"""After so long a process that could not start is started again, as a supervisor would."""


class Life:
    """One run of a process: its log, and why it ended."""

    def __init__(self, number: int, log: Path) -> None:
        self.number = number
        self.log = log
        self.writer = ""
        self.ready = False
        self.ended = ""
        self.killed_at = 0.0
        self._read = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines of the log; what is no JSON comes as `text`."""
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {"text": line}

    def look(self) -> bool:
        """Whether it has become ready since the last look."""
        if self.ready:
            return False
        with self.log.open("rb") as log:
            log.seek(self._read)
            data = log.read()
        whole, _, _ = data.rpartition(b"\n")
        self._read += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") in READY:
                    self.ready, self.writer = True, entry.get("writer", "")
        return self.ready


class Service:
    """One process of the fleet by name, started again and again."""

    def __init__(
        self, name: str, command: Sequence[str], urls: Callable[[], Sequence[str]], folder: Path, ledger: Ledger,
        prefix: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.lives: list[Life] = []
        self.process: AsyncProgram | None = None
        self.paused = False
        self.wanted = False
        """Whether it is meant to run."""
        self._command = list(command)
        self._urls = urls
        self._folder = folder
        self._ledger = ledger
        self._prefix = list(prefix)
        self._turn = anyio.Lock()

    @property
    def life(self) -> Life:
        """The last life."""
        return self.lives[-1]

    @property
    def runs(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.returncode is None

    @property
    def up(self) -> bool:
        """Whether it runs, is not paused, and has said that it is ready."""
        return self.runs and not self.paused and self.life.ready

    async def start(self) -> None:
        """Start it unless it runs."""
        async with self._turn:
            self.wanted = True
            if self.runs:
                return
            life = Life(len(self.lives) + 1, self._folder / f"{self.name}.{len(self.lives) + 1}.log")
            self.lives.append(life)
            servers = [part for url in self._urls() for part in ("--server", url)]
            command = [*self._prefix, sys.executable, "-m", "kvplane", *self._command, *servers]
            with life.log.open("ab") as log:
                self.process = await open_program(
                    command, cwd=ROOT, stdin=DEVNULL, stdout=log,
                    stderr=STDOUT, start_new_session=True,
                )  # fmt: skip
            self.paused = False

    async def end(self, number: signal.Signals) -> None:
        """Send SIGKILL or SIGTERM and wait until it is gone."""
        async with self._turn:
            self.wanted = False
            if self.process is None or not self.lives or self.life.ended:
                return
            how = "killed" if number is signal.SIGKILL else "stopped"
            self.life.killed_at = self._ledger.now
            gone = self.process.returncode is not None
            self.signal(signal.SIGCONT)
            self.signal(number)
            with anyio.move_on_after(STOP_SECONDS) as scope:
                await self.process.wait()
            if scope.cancelled_caught:
                how = f"killed, for it did not stop in {STOP_SECONDS:g} s"
                self.signal(signal.SIGKILL)
                await self.process.wait()
            self.look()
            self._end("by itself" if gone else how)

    def _end(self, how: str) -> None:
        code = self.process.returncode if self.process is not None else None
        self.life.ended = how
        self._ledger.note(
            "end", process=self.name, number=self.life.number, how=how, code=code, ready=self.life.ready,
            writer=self.life.writer, began=self.life.killed_at,
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing when the process is gone."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.paused = False
        self.signal(signal.SIGCONT)

    def look(self) -> None:
        """Write down that it became ready."""
        if self.lives and self.life.look():
            pid = self.process.pid if self.process is not None else 0
            self._ledger.note(
                "life", process=self.name, number=self.life.number, writer=self.life.writer, pid=pid
            )  # fmt: skip

    async def watch(self) -> None:
        """Look whether it became ready or ended by itself; start it again then."""
        while True:
            await anyio.sleep(0.1)
            self.look()
            if self._turn.locked() or not self.wanted or self.runs or not self.lives:
                continue
            self.look()
            self.life.killed_at = self._ledger.now
            self._end("by itself")
            await anyio.sleep(AGAIN_SECONDS)
            if self.wanted:
                await self.start()
