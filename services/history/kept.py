"""A historian that stays where it can't work: it answers every question with the reason, and begins when that is gone.

Where another historian of the fleet works, questions are left to it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import anyio
import structlog
from nats.errors import Error as NatsError

from kvplane.events.errors import KvplaneError, first_known
from kvplane.services.process.version import package_version
from kvplane.services.protocol.endpoints import served
from kvplane.services.protocol.errors import Refused
from kvplane.services.protocol.status import HistoryStatus
from kvplane.services.rpc.client import of_fleet
from kvplane.services.rpc.readiness import Readiness
from kvplane.services.rpc.server import serve, serving, stop
from kvplane.services.rpc.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from anyio.abc import TaskStatus
    from nats.aio.client import Client

    from kvplane.services.history.historian import Historian

SERVICE = "kvplane-historian"
FAILURE = "failure"
"""In the metadata of a historian that can't work: the code of the reason."""
OWN = "status_of_one"
"""The endpoint that each historian has for itself."""
AGAIN_SECONDS = 5.0
"""How often it is tried whether the historian can work by now."""
LIST_SECONDS = 0.5

_log = structlog.get_logger("kvplane.history")


class Kept:
    """A historian and what answers in its place. `work` runs one, and calls what it is given with it when it answers.

    `run` raises what has nothing to do with the history: the connection is broken, or there is a defect.
    """

    role = "historian"

    def __init__(
        self, client: Client, fleet: str, folder: Path, work: Callable[[Callable[[Historian], None]], Awaitable[None]]
    ) -> None:  # fmt: skip
        self.client = client
        self.folder = folder.absolute()
        self.fleet = fleet
        self.id = uuid4().hex[:12]
        self.failure = ""
        """Why it can't work; empty when it can, or when that is not known yet."""
        self.code = ""
        self.answers: Literal["", "for itself", "for the fleet"] = ""
        """To what it answers with the reason."""
        self.working: Historian | None = None
        self._work = work
        self.tally = self._tally = Tally()
        self._changed = anyio.Event()

    def readiness(self) -> Readiness:
        """Whether the historian answers questions."""
        if self.working is not None:
            return self.working.readiness()
        return Readiness(self.failure or "the history is being opened", {})

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the history until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._answer_forever)
            task_status.started()
            while True:
                try:
                    await self._work(self._works)
                except (KvplaneError, BaseExceptionGroup) as error:
                    known = _only_known(error)
                    if known is None or self.client.is_closed:
                        raise
                    self._fails(known)
                await anyio.sleep(AGAIN_SECONDS)

    def _works(self, historian: Historian) -> None:
        self.working, self.tally, self.failure = historian, historian.tally, ""
        self._change()

    def _fails(self, error: KvplaneError) -> None:
        message = str(error)
        if str(self.folder) not in message:
            message = f"{message} (--history {self.folder})"
        if message != self.failure:
            _log.error("historian_cannot_work", error=message, code=error.code, tries_again_every=AGAIN_SECONDS)
        self.working, self.tally = None, self._tally
        self.failure, self.code = message, error.code
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _answer_forever(self) -> None:
        """Answer with the reason while there is one."""
        while True:
            changed = self._changed
            if not self.failure:
                await changed.wait()
                continue
            failure, alone = self.failure, not await self._others()
            async with anyio.create_task_group() as group:
                answers: dict[str, Callable[..., Any]] = {spec.name: self._refuse for spec in served("historian")} | {
                    OWN: self._status
                }
                answered = serving("historian", self.fleet, self.id, answers)
                if not alone:
                    answered = [endpoint for endpoint in answered if endpoint.name == OWN]
                about = {"fleet": self.fleet, "historian": self.id, FAILURE: self.code}
                described = f"history of fleet {self.fleet}, which can't be kept"
                service = await serve(self.client, group, SERVICE, described, answered, about, self._tally)
                self.answers = "for the fleet" if alone else "for itself"
                try:
                    while self.failure == failure and alone == (not await self._others()):
                        with anyio.move_on_after(AGAIN_SECONDS):
                            await self._changed.wait()
                finally:
                    self.answers = ""
                    await stop(service)

    async def _others(self) -> bool:
        """Whether another historian of the fleet works."""
        with suppress(NatsError, TimeoutError, OSError):
            found = await of_fleet(self.client, SERVICE, self.fleet, seconds=LIST_SECONDS)
            return any(FAILURE not in metadata for metadata in found)
        return False

    async def _refuse(self, _: object) -> None:
        raise Refused(503, self.code, f"the historian of fleet {self.fleet!r} is there, but can't work: {self.failure}")

    async def _status(self, _: object) -> HistoryStatus:
        return HistoryStatus(
            fleet=self.fleet, historian=self.id, version=package_version(), clock=time.time(), healthy=False, works=False,
            stored=0, failure=f"the historian can't work: {self.failure}",
        )  # fmt: skip


def _only_known(error: KvplaneError | BaseExceptionGroup[BaseException]) -> KvplaneError | None:
    """The error of ours, if there are only such."""
    if isinstance(error, KvplaneError):
        return error
    return None if error.split(KvplaneError)[1] is not None else first_known(error)
