"""How the command line runs a historian: alone, or as `up` does. DuckDB is loaded where this is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import anyio

from kvplane.events.logins import without_logins
from kvplane.projections.errors import BadHistory
from kvplane.services.cli.common import allow_modules, run_until_signal, start
from kvplane.services.history.historian import Historian
from kvplane.services.history.ingest import give_way, relax_collector
from kvplane.services.history.kept import Kept
from kvplane.services.observability.web import observing
from kvplane.services.process.owner import owned

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.services.cli.common import Common
    from kvplane.services.history.ingest import Retention
    from kvplane.services.history.pages import Limits
    from kvplane.services.process.owner import Owner

WHAT = "kvplane historian"


def holding(folder: Path, what: str, common: Common) -> AbstractAsyncContextManager[Owner]:
    """The hold on a history's folder. Raises `FolderTaken`, also later, and `BadHistory`."""

    def failed(error: OSError) -> BadHistory:
        return BadHistory(f"the history's folder can't be written ({error.strerror}); choose another with --history")

    instead = "ask it with `kvplane sql`, stop it, or choose another folder with --history"
    return owned(folder, what, url=without_logins(common.server[0]), instead=instead, failed=failed)


def _made(client: Client, folder: Path, common: Common, **options: Any) -> Historian:  # noqa: ANN401 - passed on
    return Historian(
        client, common.fleet, folder, servers=common.server, credentials=common.credentials, ca=common.ca, **options
    )


async def run_alone(
    folder: Path, limits: Limits, retention: Retention, modules: tuple[str, ...], http: str | None, common: Common
) -> None:
    """Run a historian that ends where it can't work."""
    async with common.connected(WHAT.replace(" ", "-")) as client, holding(folder, WHAT, common):
        service = _made(client, folder, common, limits=limits, retention=retention, modules=modules)
        async with observing(http, service):
            await service.run()


def keep(folder: Path, http: str | None, optional: bool, modules: tuple[str, ...], common: Common) -> None:  # noqa: FBT001
    """Run a historian as `up` does: where it can't work, it stays and answers why. HTTP is `optional` as in `observing`."""
    start(common)
    # What is written from here on is for its owner alone: the log, the history, and what servers say of themselves.
    os.umask(0o077)
    allow_modules(modules)
    # Before DuckDB starts its threads.
    give_way()
    relax_collector()
    run_until_signal(_keep, folder, http, optional, modules, common)


async def _keep(folder: Path, http: str | None, optional: bool, modules: tuple[str, ...], common: Common) -> None:  # noqa: FBT001
    async with common.connected(WHAT.replace(" ", "-")) as client:
        service = kept(client, folder, modules, common)
        async with observing(http, service, optional=optional):
            await service.run()


def kept(client: Client, folder: Path, modules: tuple[str, ...], common: Common) -> Kept:
    """A historian that answers with the reason where it can't work."""

    async def work(works: Callable[[Historian], None]) -> None:
        async with holding(folder, WHAT, common), anyio.create_task_group() as group:
            historian = _made(client, folder, common, modules=modules)
            await group.start(historian.run)
            works(historian)

    return Kept(client, common.fleet, folder, work)
