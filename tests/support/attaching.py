"""The service of `kvplane attach` in the test's own process, and how it ended."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from kvplane.services.engines.adapters import Adapters
from kvplane.services.engines.attachment import Attachment
from kvplane.services.engines.facts import Engine
from kvplane.services.protocol.errors import EngineUnfit
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.fleet import Fleet


class Attaching:
    """One such service."""

    def __init__(self, service: Adapters) -> None:
        self.service = service
        self.failure = ""
        self._ended = anyio.Event()

    async def run(self) -> None:
        try:
            await self.service.run()
        except EngineUnfit as error:
            self.failure = str(error)
        except BaseExceptionGroup as group:
            matched, rest = group.split(EngineUnfit)
            if matched is None or rest is not None:
                raise
            innermost: BaseException = matched
            while isinstance(innermost, BaseExceptionGroup):
                innermost = innermost.exceptions[0]
            self.failure = str(innermost)
        finally:
            self._ended.set()

    async def member(self) -> None:
        """Wait until all its nodes are registered."""
        await until(lambda: self.service.adapters and all(one.epoch for one in self.service.adapters), 30)

    async def ended(self) -> str:
        """The sentence with which it ends by itself."""
        with anyio.fail_after(30):
            await self._ended.wait()
        return self.failure


@asynccontextmanager
async def attaching(
    fleet: Fleet, url: str, *, kind: Any = "vllm", key: str = "", **wanted: Any
) -> AsyncIterator[Attaching]:
    wanted = {"node": "a", "pulse_seconds": 0.2, **wanted}
    options: dict[str, Any] = {"key": key} if key else {}
    async with Engine(kind, url, **options) as engine, anyio.create_task_group() as group:
        one = Attaching(Adapters(await fleet.connect("attach"), fleet.name, engine, Attachment(**wanted)))
        group.start_soon(one.run)
        yield one
        group.cancel_scope.cancel()
