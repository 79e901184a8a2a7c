"""What a historian and a process that answers a question say to each other."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from kvplane.services.protocol.messages import Column  # noqa: TC001 - msgspec looks it up as it decodes


class Question(Struct, frozen=True, kw_only=True):
    """A question and what its answer may take: seconds of work, rows, bytes of memory, on the disk, of a page, of a row."""

    sql: str
    form: Literal["rows", "arrow"]
    seconds: float
    rows: int
    archive: str
    """The archive's folder."""
    live: str
    """The folder of live rows in files."""
    temporary: str
    """A folder of its own, for what it can't hold in memory."""
    hidden: list[str]
    memory: int
    spill: int
    threads: int
    page_bytes: int
    row_bytes: int
    message_bytes: int
    """Most bytes of a message that it goes out with."""


class Needed(Struct, frozen=True, tag=True):
    """Tables that the question is about."""

    tables: list[str]


class Given(Struct, frozen=True, kw_only=True):
    """What there is of them, at one moment: files of the archive, those with the same columns together, and of live rows."""

    archived: int
    """Sequence up to which the archive's files have the rows."""
    stored: int
    """Sequence up to which all is there."""
    archive: dict[str, list[list[str]]]
    live: dict[str, list[str]]


class Page(Struct, frozen=True, kw_only=True, tag=True):
    """A page of the answer, and whether it is the last."""

    columns: list[Column]
    rows: list[list[Any]] | None
    data: bytes
    ended: bool


class Failed(Struct, frozen=True, tag=True):
    """Why there is no answer."""

    status: int
    code: str
    sentence: str


encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_needed = msgspec.msgpack.Decoder(Needed | Failed).decode
decode_given = msgspec.msgpack.Decoder(Given).decode
decode_page = msgspec.msgpack.Decoder(Page | Failed).decode
