"""Trace context: the `traceparent` of W3C Trace Context, level 1, as it comes with a request and goes with its answer.

kvplane makes no spans of its own. It carries what it is given from the request to the events and back, so that a decision can
be found from a trace, and a trace from a decision.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADER = "traceparent"
_LENGTH = 55
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def parse(text: str) -> str:
    """A traceparent as it is carried on; empty when it is none, which is never an error.

    Of a version that is not known here, the fields of version 00 are taken, as the recommendation wants it.
    """
    match = _FORM.match(text)
    if match is None:
        return ""
    version, trace, parent, flags = match.groups()
    longer = len(text) > _LENGTH and (version == "00" or text[_LENGTH] != "-")
    if version == "ff" or longer or not int(trace, 16) or not int(parent, 16):
        return ""
    return f"00-{trace}-{parent}-{flags}"


def in_headers(headers: Mapping[str, str]) -> str:
    """What the headers of a message say; some clients write all headers like HTTP's, `Traceparent`."""
    return headers.get(HEADER) or headers.get("Traceparent") or ""
