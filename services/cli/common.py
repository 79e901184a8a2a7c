"""Options that all commands share, and how commands run."""

from __future__ import annotations

import faulthandler
import signal
import sys
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import inf
from pathlib import Path  # noqa: TC003 - options are read by their types
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import anyio
import structlog
from cyclopts import Parameter

from kvplane.events.errors import KvplaneError, first_known
from kvplane.events.log.connection import DEFAULT_URL, connected
from kvplane.events.subjects import check_fleet
from kvplane.services.process import logs
from kvplane.services.process.descriptors import raise_limit
from kvplane.services.process.modules import look_here
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager

    from anyio.abc import TaskStatus
    from nats.aio.client import Client

T = TypeVar("T")

STOP_SECONDS = 20.0

PolicyModules = Annotated[tuple[str, ...], Parameter(name="--policy-module", consume_multiple=True)]
ServedPolicyModules = Annotated[PolicyModules, Parameter(env_var="KVPLANE_POLICY_MODULE")]
Http = Annotated[str | None, Parameter(env_var="KVPLANE_HTTP")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """Where the fleet is, and how to log."""

    server: Annotated[tuple[str, ...], Parameter(env_var="KVPLANE_SERVER")] = (DEFAULT_URL,)
    """NATS server, as a URL; may be repeated."""
    fleet: Annotated[str, Parameter(env_var="KVPLANE_FLEET")] = "default"
    """Name of the fleet."""
    credentials: Annotated[Path | None, Parameter(env_var="KVPLANE_CREDENTIALS")] = None
    """Seed file to log in with, where servers ask for one; `kvplane auth` makes it."""
    ca: Annotated[Path | None, Parameter(env_var="KVPLANE_CA")] = None
    """Certificate that the servers' must be signed by: ca.pem of the auth folder."""
    log_level: Annotated[logs.Level, Parameter(env_var="KVPLANE_LOG_LEVEL")] = "info"
    """Least level that is logged."""
    log_format: Annotated[Literal["auto", "text", "json"], Parameter(env_var="KVPLANE_LOG_FORMAT")] = "auto"
    """How to log: for people on a terminal and as JSON elsewhere, or always the same."""

    def connected(self, name: str, *, seconds: float = inf) -> AbstractAsyncContextManager[Client]:
        """A client of the servers, see `events.log.connection`. Services wait for them for as long as it takes."""
        return connected(self.server, name, connect_seconds=seconds, credentials=self.credentials, ca=self.ca)


COMMON = Common()


def start(common: Common, *, quiet: bool = False) -> None:
    """Check the options and set up logging; `quiet` commands log warnings only, unless asked for more."""
    check_fleet(common.fleet)
    level: logs.Level = "warning" if quiet and common.log_level == "info" else common.log_level
    logs.configure(level, common.log_format)


def allow_modules(modules: Iterable[str]) -> None:
    """Let policies be taken from these modules, also those of the current folder. Raises `BadRequest` for one that is none."""
    # Policies are slow to load, and most have none of their own.
    for module in modules:
        from kvplane.services.routing.policies import allow  # noqa: PLC0415

        look_here()
        allow([module])
        try:
            import_module(module)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - importing runs anybody's code
            raise BadRequest(f"--policy-module {module!r} can't be imported: {error}") from None


@asynccontextmanager
async def outlasting(run: Callable[..., Awaitable[object]]) -> AsyncIterator[None]:
    """Run a service for the length of a block, also while a block that was cancelled comes to its end."""
    # A cancellation from outside does not reach it; the end of the block does.
    scope = anyio.CancelScope(shield=True)

    async def running(*, task_status: TaskStatus[None]) -> None:
        with scope:
            await run(task_status=task_status)

    async with anyio.create_task_group() as group:
        try:
            await group.start(running)
            yield
        finally:
            scope.cancel()


def run_async(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:  # noqa: ANN401 - passed through
    """Run a coroutine function to its end."""
    return anyio.run(function, *arguments, backend_options={"use_uvloop": True})


def run_until_signal(function: Callable[..., Awaitable[object]], *arguments: Any) -> None:  # noqa: ANN401
    """Run a coroutine function until it ends, or cancel it in good order on SIGINT or SIGTERM.

    One that has not ended `STOP_SECONDS` after the signal is ended hard, with exit code 1.
    """
    raise_limit()

    async def main() -> None:
        async with anyio.create_task_group() as group:

            async def stop() -> None:
                with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    async for _ in signals:
                        # A service that was asked to leave leaves: what it waits for is written to standard error.
                        faulthandler.dump_traceback_later(STOP_SECONDS, exit=True)
                        group.cancel_scope.cancel()
                        return

            group.start_soon(stop)
            await function(*arguments)
            group.cancel_scope.cancel()

    try:
        run_async(main)
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def failing_as(event: str) -> Iterator[None]:
    """In a process that a command keeps beside itself: an error of ours is one line of the log, and exit code 1."""
    try:
        yield
    except (KvplaneError, BaseExceptionGroup) as error:
        known = first_known(error) if isinstance(error, BaseExceptionGroup) else error
        if known is None:
            raise
        structlog.get_logger("kvplane").error(event, error=str(known), code=known.code)
        sys.exit(1)
