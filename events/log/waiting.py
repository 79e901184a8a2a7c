"""Waiting for a NATS server, and saying for what: who can't connect learns within seconds why."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import anyio
import structlog
from nats.errors import Error as NatsError

from kvplane.events.errors import BadServer, KvplaneError, LogUnavailable, WrongServer
from kvplane.events.log.probe import Answer, answers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from nats.aio.client import Client

DEFAULT_PORT = 4222
LOOK_AFTER_SECONDS = 0.5
"""A connection that took so long may never come about: then it is looked what answers."""
LOOK_AGAIN_SECONDS = 2.0
SLOW_SECONDS = 3.0
"""So long at the least those are waited for that may be there and slow, as one of several that was cut off makes others be."""
REPORT_AFTER_SECONDS = 1.2
REPORT_AGAIN_SECONDS = 10.0
CLOSE_SECONDS = 3.0

_log = structlog.get_logger("kvplane.nats")


class Place(NamedTuple):
    """Where a server is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_IN_A_LOGIN = "; write what is special in its login as %40 for @, %2F for /, %3A for :, %23 for #, %3F for ?"


def _odd(server: str) -> bool:
    """Whether a login holds what ends the host, so that a part of it would be taken for the host."""
    return "@" in server and bool(re.search(r"[/?#].*@", server.partition("://")[2] or server))


def place_of(server: str) -> Place:
    """Where a server's URL leads. Raises `BadServer`."""
    try:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        port = parts.port
    except ValueError:
        parts, port = None, None
    if parts is None or parts.scheme not in {"nats", "tls"} or not parts.hostname or port == 0 or _odd(server):
        # Without the login that a URL may hold, whatever is in it.
        shown = re.sub(r"(^|//).*@", r"\1", server, flags=re.DOTALL)[:80]
        raise BadServer(
            f"--server or KVPLANE_SERVER is {shown!r}, which is no NATS server's address; write nats://HOST:PORT, such as "
            f"nats://127.0.0.1:{DEFAULT_PORT}{_IN_A_LOGIN if '@' in server else ''}"
        )
    return Place(parts.hostname, port or DEFAULT_PORT)


async def connect(
    client: Client, servers: Sequence[str], name: str, dial: Callable[[], Awaitable[None]], *, seconds: float
) -> None:  # fmt: skip
    """Call `dial`, which connects the client, and say what it waits for.

    Raises what `dial` does; `LogUnavailable` when nobody answered in `seconds`; `BadServer`; and `WrongServer` as soon as it is
    known that what answers everywhere is no NATS server.
    """
    waiting = _Waiting(client, [place_of(server) for server in servers], name, seconds)
    failed: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(waiting.look, group.cancel_scope)
            group.start_soon(waiting.report)
            try:
                await dial()
            except (KvplaneError, NatsError, OSError) as error:
                failed = error
            group.cancel_scope.cancel()
    finally:
        if not client.is_connected:
            # A client that is left goes on connecting, or keeps its socket.
            with anyio.move_on_after(CLOSE_SECONDS, shield=True), suppress(NatsError, OSError, TimeoutError):
                await client.close()
    if failed is None and client.is_connected:
        return
    if isinstance(failed, KvplaneError):
        raise failed
    raise waiting.verdict or waiting.unavailable() from None


class _Waiting:
    """One client that waits for its first connection."""

    def __init__(self, client: Client, places: Sequence[Place], name: str, seconds: float) -> None:
        self.verdict: KvplaneError | None = None
        self._client, self._places, self._name = client, places, name
        self._begun, self._seconds = anyio.current_time(), seconds
        self._found: dict[Place, Answer] = {}
        self._changed = anyio.Event()

    @property
    def _nobody(self) -> bool:
        """Whether it is known of all of them that nobody is there."""
        return bool(self._found) and all(found.kind in {"refused", "unknown"} for found in self._found.values())

    @property
    def _left(self) -> float:
        """How many seconds are left."""
        seconds = self._seconds if self._nobody else max(self._seconds, SLOW_SECONDS)
        return self._begun + seconds - anyio.current_time()

    async def look(self, scope: anyio.CancelScope) -> None:
        """Look what answers, again and again; cancel the scope with a verdict when there is one."""
        await anyio.sleep(min(LOOK_AFTER_SECONDS, self._seconds))
        while self.verdict is None:
            before = list(self._found.values())
            async with anyio.create_task_group() as group:
                for place in dict.fromkeys(self._places):
                    group.start_soon(self._look_at, place)
            if list(self._found.values()) != before:
                self._changed.set()
            if all(found.final for found in self._found.values()):
                self.verdict = WrongServer(
                    f"no NATS server is there: {self._findings()}; name yours with --server or KVPLANE_SERVER, such as "
                    f"nats://127.0.0.1:{DEFAULT_PORT}{self._remedy()}"
                )
            else:
                await anyio.sleep(max(0.0, min(LOOK_AGAIN_SECONDS, self._left)))
                if self._left <= 0:
                    self.verdict = self.unavailable()
        scope.cancel()

    async def _look_at(self, place: Place) -> None:
        self._found[place] = await answers(*place)

    async def report(self) -> None:
        """Say what is waited for, at first, when that changes, and now and then."""
        await anyio.sleep(REPORT_AFTER_SECONDS)
        while True:
            self._changed = anyio.Event()
            if not self._nobody or self._left > LOOK_AGAIN_SECONDS:
                # Otherwise the verdict says it, in a moment.
                where = ", ".join(map(str, self._places))
                _log.warning("nats_waited_for", client=self._name, servers=where, reason=self._findings())
            with anyio.move_on_after(REPORT_AGAIN_SECONDS):
                await self._changed.wait()

    def _findings(self) -> str:
        error = self._client.last_error
        sentences = "; ".join(dict.fromkeys(found.sentence for found in self._found.values()))
        if any(found.kind == "nats" for found in self._found.values()) and error is not None:
            sentences += f", and the connection did not come about ({str(error) or type(error).__name__})"
        return sentences or "no answer yet"

    def _remedy(self) -> str:
        if any(found.kind == "tls" for found in self._found.values()):
            return ". One that speaks TLS from the first byte has `handshake_first` on; kvplane speaks TLS behind the greeting"
        return ""

    def unavailable(self) -> LogUnavailable:
        """That nobody answered, and what is known of why."""
        where = ", ".join(map(str, self._places))
        return LogUnavailable(
            f"no NATS server answers at {where} ({self._findings()}); start one with `kvplane up`, or name yours with --server "
            "or KVPLANE_SERVER"
        )
