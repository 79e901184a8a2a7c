"""Where on the log a time is."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING

from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from kvplane.events.errors import LogUnavailable
from kvplane.events.subjects import stream_name

if TYPE_CHECKING:
    from datetime import datetime

    from nats.js import JetStreamContext
    from nats.js.api import StreamState


async def first_since(js: JetStreamContext, fleet: str, state: StreamState, since: datetime) -> int:
    """Sequence of the first commit that was stored at or after a time (UTC without a zone); the next one when none was.

    Some twenty messages are read, whatever the log's length. Raises `LogUnavailable`.
    """
    wanted = since.replace(tzinfo=UTC)
    low, high = max(1, state.first_seq), state.last_seq + 1
    while low < high:
        middle = (low + high) // 2
        try:
            found = await js.get_msg(stream_name(fleet), middle)
        except NotFoundError:
            # It was purged meanwhile, with all before it.
            low = middle + 1
            continue
        except (APIError, NatsError) as error:
            raise LogUnavailable(f"the log of fleet {fleet!r} does not answer: {error!r}") from error
        if found.time is None or found.time >= wanted:
            high = middle
        else:
            low = middle + 1
    return low
