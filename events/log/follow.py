"""Reading the log: every message once, in order, for ever; or an alarm.

A follower has an ephemeral push consumer without acknowledgements. When messages or heartbeats stop, when the server
numbers a delivery out of turn, or after a reconnect that lost the consumer, it makes a new one from the sequence after
the last that it handed on. A message that is missing on the log itself can't be got again: that is `LogCorrupt`.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import anyio
import structlog
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from kvplane.events.codec import Message
from kvplane.events.errors import KvplaneError, LogCorrupt, LogHole, LogMissing, LogPurged, LogUnavailable
from kvplane.events.log.client import check_open
from kvplane.events.log.connection import beside
from kvplane.events.log.deliveries import Deliveries, Gate, pending
from kvplane.events.log.servers import in_cluster
from kvplane.events.log.stream import open_stream, stream_info, unfit
from kvplane.events.subjects import stream_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import StreamState

HEARTBEAT_SECONDS = 1.0
LOOK_SECONDS = 0.1
"""How often the follower looks whether the connection was replaced."""
SOON_SECONDS = 1.0
"""How long the server has to answer. What is asked while a cluster elects a leader is never answered."""
PATIENT_TRIES, PATIENT_SECONDS = 10, 10.0
"""After so many tries it has longer: it may be slow."""
CUT_OFF_SECONDS = 30.0
"""So long a server that lost the others may still take itself for the leader, and some more."""
PENDING_BYTES = 256 << 20
"""Bytes that may wait in the client; the server's flow control keeps below it."""

_log = structlog.get_logger("kvplane.log")


class Follower:
    """Hands every message of a fleet's log to `handle`, in order, from the sequence after `applied` on.

    `handle` is called in the event loop and must not wait. With `apart` it has a connection of its own, so that requests do not
    wait behind a flood of commits: the server sends megabytes ahead. `caught_up` is set once the messages that were on the log
    when `run` began have been handed on.
    """

    def __init__(
        self, client: Client, fleet: str, handle: Callable[[Message], object], *, applied: int = 0, apart: bool = False
    ) -> None:
        self._own = client
        self._apart = apart
        self.client = client
        """The one that reads now."""
        self._fleet = fleet
        self._handle = handle
        self._stream = stream_name(fleet)
        self.applied = applied
        self.target = 0
        """Last sequence on the log when `run` began."""
        self.caught_up = anyio.Event()
        self.healthy = False
        """Whether messages or heartbeats arrive."""
        self.restarts = 0
        self.deliveries: Deliveries | None = None
        """The consumer that is read from now."""
        self._last_reply = ""
        self._stopped: KvplaneError | Exception | None = None
        self._restart = anyio.Event()
        self._gate = Gate()

    @property
    def behind(self) -> int:
        """Commits that are on the log and were not handed on, as the server said with the last one that was."""
        return pending(self._last_reply) if self._last_reply else max(0, self.target - self.applied)

    @property
    def paused(self) -> bool:
        """Whether nothing is handed on."""
        return self._gate.opened is not None

    def pause(self) -> None:
        """Hand on nothing until `resume`; the server holds back what is on its way."""
        self._gate.shut()

    def resume(self) -> None:
        """Go on."""
        self._gate.open()

    async def run(self) -> None:
        """Follow until cancelled. Raises `LogCorrupt`, `LogMissing`, `LoginRefused`, or what `handle` raised.

        After `LogPurged` or `LogHole` it may be called again, with `applied` set to where a snapshot was taken.
        """
        self._stopped = None
        async with beside(self._own, "log") if self._apart else contextlib.nullcontext(self._own) as self.client:
            state = await self._believed(self._first_look)
            self.target = state.last_seq
            if self.applied >= self.target:
                self._catch_up()
            try:
                while True:
                    await self._start(state)
                    await self._watch()
                    self.restarts += 1
            finally:
                await self._stop()

    async def _first_look(self) -> StreamState:
        """State of the log; a cluster that elects a leader is waited for."""
        js = self.client.jetstream(timeout=SOON_SECONDS)
        for _ in range(PATIENT_TRIES):
            with contextlib.suppress(LogUnavailable):
                return await open_stream(js, self._fleet)
            await anyio.sleep(LOOK_SECONDS)
        return await open_stream(self.client.jetstream(timeout=PATIENT_SECONDS), self._fleet)

    async def _look_again(self, js: JetStreamContext) -> StreamState:
        """State of the log that came back. With settings that are not a log's who reads it goes on: it has what is on it."""
        info = await stream_info(js, self._fleet)
        if sentence := unfit(info, self._fleet):
            _log.error("log_unfit", fleet=self._fleet, error=sentence)
        return info.state

    async def _believed(self, look: Callable[[], Awaitable[StreamState]]) -> StreamState:
        """State of the log, checked. Raises `LogCorrupt`."""
        state = await not_cut_off(self.client, look, self.applied)
        self._check(state)
        return state

    def _check(self, state: StreamState) -> None:
        """Raise `LogCorrupt` when the stream can't go on where this follower is."""
        if self.applied + 1 < state.first_seq and state.first_seq > 1:
            raise LogPurged(
                f"the log of fleet {self._fleet!r} begins at {state.first_seq}, but {self.applied + 1} is needed next; "
                "there is no snapshot that leads there. A historian that has it can give it: start one, and this again"
            )
        if self.applied > state.last_seq:
            raise LogCorrupt(
                f"the log of fleet {self._fleet!r} ends at {state.last_seq}, but {self.applied} was applied already; "
                "it was replaced or has lost messages"
            )

    async def _check_end(self, js: JetStreamContext, state: StreamState) -> None:
        """Raise `LogHole` when the last messages are missing: nothing behind them would show it."""
        if not state.num_deleted or self.applied >= state.last_seq:
            return
        try:
            await js.get_msg(self._stream, state.last_seq)
        except NotFoundError:
            raise LogHole(self._missing(f"messages behind {self.applied}, up to {state.last_seq}, are")) from None

    def _missing(self, which: str) -> str:
        return (
            f"{which} missing on the log of fleet {self._fleet!r}, and no snapshot leads beyond. If a coordinator still runs, "
            "`kvplane snapshot take` saves what it knows; a historian that has them can give it: start one, and this again; "
            "else restore the log from a backup"
        )

    async def _start(self, state: StreamState) -> None:
        """Make a consumer. `state` is that of the log as it was seen last."""
        self._restart = anyio.Event()
        tries = 0
        while True:
            check_open(self.client)
            try:
                tries += 1
                js = self.client.jetstream(timeout=SOON_SECONDS if tries < PATIENT_TRIES else PATIENT_SECONDS)
                await self._stop()
                if self.restarts:
                    # What came back may not be what went away.
                    state = await self._believed(partial(self._look_again, js))
                self.deliveries = Deliveries(
                    self.client, self._stream, "follower", self._take, self._restart.set, gate=self._gate
                )
                await self._check_end(js, state)
                await self.deliveries.open(
                    js, after=self.applied, heartbeat=HEARTBEAT_SECONDS, pending_bytes=PENDING_BYTES
                )
            except (NatsError, APIError, OSError, TimeoutError, LogUnavailable, LogMissing) as error:
                self.healthy = False
                _log.debug("follower_waits", fleet=self._fleet, error=repr(error))
                await anyio.sleep(0.1)
            else:
                return

    async def _stop(self) -> None:
        deliveries, self.deliveries = self.deliveries, None
        if deliveries is not None:
            await deliveries.close()

    async def _watch(self) -> None:
        """Return when the consumer has to be made anew."""
        reconnects = self.client.stats["reconnects"]
        quiet_since = anyio.current_time()
        while True:
            with anyio.move_on_after(LOOK_SECONDS):
                await self._restart.wait()
            if self._stopped is not None:
                await self._say_why()
                return
            if self._restart.is_set():
                return
            check_open(self.client)
            self.healthy = self.client.is_connected
            active = self.deliveries is not None and self.deliveries.activity()
            if active or self.paused:
                quiet_since = anyio.current_time()
            if self.client.is_connected and self.client.stats["reconnects"] != reconnects:
                # The server may have restarted and forgotten the consumer.
                return
            if anyio.current_time() - quiet_since > 2 * HEARTBEAT_SECONDS:
                self.healthy = False
                _log.warning("follower_restarts", fleet=self._fleet, applied=self.applied)
                return

    async def _say_why(self) -> None:
        """Raise what stopped the follower. A gap at the beginning of the log is a compaction that was faster."""
        stopped, self._stopped = self._stopped, None
        if isinstance(stopped, LogCorrupt):
            try:
                await self._believed(self._first_look)
            except LogMissing:
                pass
            except LogUnavailable:
                # The gap is found again when the log can be asked.
                return
        if stopped is not None:
            raise stopped

    def _take(self, sequence: int, time: int, message: Msg) -> None:
        if self._stopped is not None or self._restart.is_set():
            return
        if sequence != self.applied + 1:
            if sequence > self.applied:
                self._gap(sequence)
            return
        try:
            self._handle(Message(sequence, message.subject, time, message.headers, message.data))
        except Exception as error:  # noqa: BLE001 - carried to run(), which raises it
            self._stopped = error
            self._restart.set()
            return
        self.applied = sequence
        self._last_reply = message.reply
        if sequence >= self.target and not self.caught_up.is_set():
            self._catch_up()

    def _catch_up(self) -> None:
        # Whoever waited for this may be asked at once how it is.
        self.healthy = True
        self.caught_up.set()

    def _gap(self, sequence: int) -> None:
        self._stopped = LogHole(self._missing(f"messages {self.applied + 1} to {sequence - 1} are"))
        self._restart.set()


async def not_cut_off(client: Client, look: Callable[[], Awaitable[StreamState]], applied: int) -> StreamState:
    """State of the log, by a server that can be believed when it says that the log ends before what was read from it.

    One of a cluster that was cut off from the others may lead its old copy until it notices; only who insists is believed.
    """
    patience = anyio.current_time() + (CUT_OFF_SECONDS if in_cluster(client) else 0)
    while True:
        state = await look()
        if state.last_seq >= applied or anyio.current_time() >= patience:
            return state
        _log.warning("log_seems_shorter", applied=applied, last=state.last_seq)
        await anyio.sleep(1)


async def replay(
    client: Client, fleet: str, handle: Callable[[Message], object], *, applied: int = 0, last: int | None = None,
    idle_seconds: float = 30.0,
) -> int:  # fmt: skip
    """Hand on the messages that are on the log now, or those up to sequence `last`; return the last sequence.

    Raises `LogUnavailable` when nothing arrives for `idle_seconds`, and what `Follower.run` raises.
    """
    reached = anyio.Event()

    def upto(message: Message) -> None:
        if last is None or message.sequence <= last:
            handle(message)
        if message.sequence == last:
            reached.set()

    follower = Follower(client, fleet, handle if last is None else upto, applied=applied)
    done = follower.caught_up if last is None else reached
    if last is not None and applied >= last:
        return applied
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(follower.run)
            while not done.is_set():
                before = follower.applied
                with anyio.move_on_after(idle_seconds):
                    await done.wait()
                if not done.is_set() and follower.applied == before:
                    raise LogUnavailable(f"the log of fleet {fleet!r} sent nothing for {idle_seconds:g} s")
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        raise single(errors) from None
    return follower.applied if last is None else last


def single(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error inside a group of a single task, for callers that know no groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
