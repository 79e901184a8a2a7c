"""Structured logs: for people on a terminal, one JSON object a line elsewhere. Always on standard error."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

import structlog

from kvplane.services.process.terminal import log_printable

if TYPE_CHECKING:
    from structlog.typing import Processor

Level = Literal["debug", "info", "warning", "error"]


def _worth_saying(record: logging.LogRecord) -> bool:
    # Said at every end of an encrypted connection, by design of asyncio's streams.
    return "eof_received() has no effect when using ssl" not in record.getMessage()


def configure(level: Level = "info", form: Literal["auto", "text", "json"] = "auto") -> None:
    """Set up logging for this process."""
    as_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors += [
            structlog.processors.format_exc_info,
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
