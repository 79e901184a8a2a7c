"""A log as a file of JSON lines, one a message, with its body in base64."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from kvplane.events.codec import Message

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def messages_of(file: Path) -> list[Message]:
    """The messages in a file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Message(line["sequence"], line["subject"], line["time"], line["headers"], base64.b64decode(line["body"]))
        for line in lines
    ]


def write(file: Path, messages: Iterable[Message]) -> None:
    """Write messages to a file."""
    with file.open("w") as out:
        for message in messages:
            fields = {**message._asdict(), "body": base64.b64encode(message.body).decode()}
            out.write(json.dumps(fields) + "\n")
