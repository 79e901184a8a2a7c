"""Structured logs: for people on a terminal, one JSON object a line elsewhere. Always on standard error."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Literal

import structlog

from kvplane.services.process.terminal import log_printable, log_without_logins

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, Processor

RATION_LINES, RATION_SECONDS = 100, 10.0
"""So many lines of one event are written in so many seconds."""

Level = Literal["debug", "info", "warning", "error"]


def _worth_saying(record: logging.LogRecord) -> bool:
    # Said at every end of an encrypted connection, by design of asyncio's streams.
    return "eof_received() has no effect when using ssl" not in record.getMessage()


class Rationed:
    """Lets so many lines of one event through in a while, and counts the others: most of them are said on others' behalf.

    The next line of the event says how many were left out. What is asked for with `--log-level debug` is not rationed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}
        self._lines: Counter[str] = Counter()

    def __call__(self, _: object, level: str, line: EventDict) -> EventDict:
        """A processor of structlog. Raises `DropEvent`."""
        if level == "debug":
            return line
        # Events are named in the source, so there are not many.
        event, now = str(line.get("event")), self._clock()
        if now - self._since.get(event, -math.inf) >= RATION_SECONDS:
            left_out = self._lines[event] - RATION_LINES
            self._since[event], self._lines[event] = now, 0
            if left_out > 0:
                line["left_out"] = left_out
        self._lines[event] += 1
        if self._lines[event] > RATION_LINES:
            raise structlog.DropEvent
        return line


def configure(level: Level = "info", form: Literal["auto", "text", "json"] = "auto") -> None:
    """Set up logging for this process."""
    as_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    processors: list[Processor] = [
        Rationed(),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors += [structlog.processors.format_exc_info, log_without_logins, structlog.processors.JSONRenderer()]
    else:
        processors += [
            structlog.processors.format_exc_info,
            log_without_logins,
            log_printable,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    logging.getLogger("asyncio").addFilter(_worth_saying)
    if logging.lastResort is not None:
        # What libraries log on their own: the same form, with the same care for what came from outside.
        steps = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *processors]
        logging.lastResort.setFormatter(structlog.stdlib.ProcessorFormatter(processors=steps))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
