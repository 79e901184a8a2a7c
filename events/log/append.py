"""Writing commits to the log.

Nothing that was acknowledged may be lost and nothing may be stored twice, so every try of a commit has the same message
id (the server drops duplicates within its window) and the same counter (readers drop duplicates at any distance). A
writer has one commit in flight a subject: counters then arrive in order, and a retry can't overtake.

`Appender` writes one commit and waits; for high rates there is `events.log.group`.
"""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

import anyio
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from kvplane.events import codec
from kvplane.events.durations import MILLI, Durations
from kvplane.events.errors import CommitTooLarge, LogError, LogUnavailable, LostRace, NotAllowed
from kvplane.events.log.servers import request
from kvplane.events.subjects import stream_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client

    from kvplane.events.types import Event

ACK_SECONDS, ACK_MOST_SECONDS = 0.5, 4.0
"""How long the first try waits for its acknowledgement, and the longest that a later one does; each waits twice as long
as the one before. A leader that steps down never answers what it had not yet proposed."""
RETRY_SECONDS, RETRY_MOST_SECONDS = 0.05, 0.25
"""First pause between tries, and the longest. While a cluster elects a leader the refusal comes at once."""
HEADERS_BYTES = 512
"""Space for headers, kept free below the server's message limit."""

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
LOOK_BACK = 1000
"""Among how many later messages of the subject a retried commit is looked for."""

_WRONG_LAST_SEQUENCE = {10071, 10164}
_TRY_AGAIN = {409, 429, 503}
"""Codes of refusals that pass: the same id is being stored just now, too much at once, no leader or quorum."""


def new_writer(role: str) -> str:
    """Name for a writer's life. Never used again, so that its counters start at 1."""
    return f"{role}-{uuid4().hex[:16]}"


def new_life(access: str) -> str:
    """The same for a writer whose name under the topic `access` stays the same."""
    return f"{access}.{uuid4().hex[:16]}"


class OnTry(Protocol):
    """Learns whether a try was acknowledged, and what was wrong when it was not."""

    def __call__(self, *, available: bool, error: str) -> None:
        """The log did, or did not, acknowledge."""


class Appender:
    """Appends commits of one writer to a fleet's log."""

    def __init__(self, client: Client, fleet: str, writer: str) -> None:
        self.client = client
        self.fleet = fleet
        self.writer = writer
        self.commits = 0
        """Commits that were acknowledged."""
        self.retries = 0
        """Tries that were not."""
        self.seconds = Durations(MILLI)
        """How long each acknowledged commit took, its retries included."""
        self._stream = stream_name(fleet)
        self._counters: dict[str, int] = {}
        self._locks: dict[str, anyio.Lock] = {}

    async def append(
        self,
        subject: str,
        events: Sequence[Event],
        *,
        expected: int | None = None,
        based_on: int | None = None,
        give_up: float = 30.0,
    ) -> int:
        """Append one commit and return its sequence, once it is on disk.

        `expected` is the sequence of the subject's last message. Raises `LostRace` when it isn't, `LogUnavailable` when
        there was no acknowledgement in `give_up` seconds (the commit may be stored then), `CommitTooLarge`.
        """
        return await self.append_encoded(
            subject, codec.encode(events), expected=expected, based_on=based_on, give_up=give_up
        )

    async def append_encoded(
        self,
        subject: str,
        body: bytes,
        *,
        expected: int | None = None,
        based_on: int | None = None,
        give_up: float = 30.0,
    ) -> int:
        """`append` for a body that is encoded already."""
        async with self._locks.setdefault(subject, anyio.Lock()):
            headers = self._headers(subject, body)
            if expected is not None:
                headers[EXPECTED] = str(expected)
            if based_on is not None:
                headers[codec.BASED_ON] = str(based_on)
            return await self._until_acknowledged(subject, body, headers, give_up, None)

    async def append_forever(self, subject: str, body: bytes, on_try: OnTry) -> int:
        """Append one commit, however long the log is away; `on_try` learns of each try whether it was acknowledged."""
        async with self._locks.setdefault(subject, anyio.Lock()):
            return await self._until_acknowledged(subject, body, self._headers(subject, body), math.inf, on_try)

    def _headers(self, subject: str, body: bytes) -> dict[str, str]:
        limit = self.client.max_payload - HEADERS_BYTES
        if len(body) > limit:
            raise CommitTooLarge(
                f"a commit of {len(body)} bytes is over the server's limit of {limit}; split it, or raise max_payload"
            )
        counter = self._counters[subject] = self._counters.get(subject, 0) + 1
        return {
            "Nats-Msg-Id": f"{self.writer}.{counter}.{uuid4().hex}",
            "Nats-Expected-Stream": self._stream,
            codec.CONTENT_TYPE: codec.MSGPACK,
            codec.WRITER: self.writer,
            codec.WRITER_SEQ: str(counter),
            codec.CRC32: codec.checksum(body),
        }

    async def _until_acknowledged(
        self,
        subject: str,
        body: bytes,
        headers: dict[str, str],
        give_up: float,
        on_try: OnTry | None,
    ) -> int:
        begin = time.perf_counter()
        deadline = anyio.current_time() + give_up
        pause = RETRY_SECONDS
        patience = ACK_SECONDS
        retried = False
        # Nobody waits for the errors of a group writer: it also waits for a full disk or a missing stream to be mended.
        worth_a_retry = (NatsError, OSError, TimeoutError, LogUnavailable if on_try is None else LogError)
        while True:
            try:
                sequence = await self._publish(subject, body, headers, patience, retried=retried)
            except worth_a_retry as error:
                self.retries += 1
                if on_try is not None:
                    on_try(available=False, error=repr(error))
                if anyio.current_time() + pause > deadline:
                    raise LogUnavailable(
                        f"the log did not acknowledge a commit on {subject} in {give_up:g} s ({error!r}); "
                        "it may be stored all the same"
                    ) from error
                retried = True
                await anyio.sleep(pause)
                pause = min(RETRY_MOST_SECONDS, pause * 2)
                patience = min(ACK_MOST_SECONDS, patience * 2)
            else:
                self.commits += 1
                self.seconds.add(time.perf_counter() - begin)
                if on_try is not None:
                    on_try(available=True, error="")
                return sequence

    async def _publish(
        self, subject: str, body: bytes, headers: dict[str, str], patience: float = ACK_SECONDS, *, retried: bool
    ) -> int:  # fmt: skip
        reply = (await request(self.client, subject, body, seconds=patience, headers=headers)).data
        try:
            answer = json.loads(reply)
            error = answer.get("error")
            if error is None:
                if answer["stream"] != self._stream or type(answer["seq"]) is not int:
                    raise ValueError(answer)  # noqa: TRY301
                sequence: int = answer["seq"]
                # Nobody knew the id before it was sent: after a retry a duplicate is one's own first try.
                if retried or not answer.get("duplicate") or await self._is_ours(subject, body, sequence):
                    return sequence
                # Someone else has used the id, so that the server takes ours for stored.
                headers["Nats-Msg-Id"] = f"{self.writer}.{headers[codec.WRITER_SEQ]}.{uuid4().hex}"
                return await self._publish(subject, body, headers, retried=retried)
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise LogUnavailable(
                f"something else than the log answered a commit on {subject}: {reply[:80]!r}"
            ) from None
        if error.get("err_code") in _WRONG_LAST_SEQUENCE:
            if retried:
                # With one replica the server looks at the expectation before the id: it may be our own first try.
                expected = int(headers[EXPECTED])
                stored = await self._stored(subject, headers["Nats-Msg-Id"], expected)
                if stored is not None:
                    return stored
            if await self._purged(headers):
                # The server has nothing left on the subject. The fold still judges the commit by what it was based on.
                headers[EXPECTED] = "0"
                return await self._publish(subject, body, headers, patience, retried=retried)
            raise LostRace(f"another writer changed {subject} first")
        if error.get("code") in _TRY_AGAIN:
            raise LogUnavailable(error.get("description", "JetStream is not available"))
        raise LogError(f"the log refused a commit on {subject}: {error.get('description')} ({error.get('err_code')})")

    async def _is_ours(self, subject: str, body: bytes, sequence: int) -> bool:
        """Whether the message that the server holds for a duplicate is this commit, as far as this writer may look."""
        try:
            stored = await self.client.jetstream().get_msg(self._stream, sequence)
        except (NotFoundError, NotAllowed):
            return True
        return stored.subject == subject and stored.data == body

    async def _purged(self, headers: dict[str, str]) -> bool:
        """Whether the message that was expected is one that the log no longer has."""
        expected = int(headers[EXPECTED])
        if not expected:
            return False
        info = await self.client.jetstream().stream_info(self._stream)
        return expected < info.state.first_seq

    async def _stored(self, subject: str, message_id: str, expected: int) -> int | None:
        """Sequence of the message with this id among those that came on the subject after the one expected."""
        js = self.client.jetstream()
        after = expected
        for _ in range(LOOK_BACK):
            try:
                message = await js.get_msg(self._stream, seq=after + 1, subject=subject, next=True)
            except NotFoundError:
                return None
            if message.headers and message.headers.get("Nats-Msg-Id") == message_id:
                return message.seq
            after = message.seq or after + 1
        return None
