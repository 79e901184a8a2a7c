"""Consumers that deliver to somebody else than their owner, or that would outlive him: a coordinator takes them away.

A server checks under which name a consumer is made, not where it delivers nor how long it stays. What is named after a key
(`events.log.inboxes`) must deliver to that key's own inbox and be forgotten when nobody listens there: so whoever loses his
key leaves nothing behind. Consumers of other names are the admin's, who alone may make them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import structlog
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from kvplane.events.errors import LogError
from kvplane.events.log.client import LogClient
from kvplane.events.log.deliveries import INACTIVE_SECONDS
from kvplane.events.log.inboxes import delivers_to, owner_of
from kvplane.events.subjects import stream_name

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.api import ConsumerInfo

LOOK_SECONDS = 5.0
"""How often a coordinator looks."""
_PAGE = 256
"""Consumers that a server names at once."""

_log = structlog.get_logger("kvplane.coordinator")


def astray(info: ConsumerInfo) -> str:
    """What is wrong with a consumer that is named after a key; empty when nothing is."""
    owner, config = owner_of(info.name), info.config
    if not owner:
        return ""
    if config is None or not delivers_to(owner, config.deliver_subject or ""):
        return "it does not deliver to its owner"
    if config.durable_name or not 0 < (config.inactive_threshold or 0) <= INACTIVE_SECONDS:
        return "it would stay when its owner is gone"
    return ""


class Strays:
    """Looks at the consumers of one fleet's log and of its snapshots."""

    def __init__(self, client: Client, fleet: str) -> None:
        self._client = client
        log = stream_name(fleet)
        self._streams = [log, f"OBJ_{log}_snapshots"]
        self.removed = 0

    async def run(self) -> None:
        """Take away what is astray, until cancelled; without credentials there are no owners."""
        if not (isinstance(self._client, LogClient) and self._client.key):
            return
        while True:
            await anyio.sleep(LOOK_SECONDS)
            try:
                await self.sweep()
            except (NatsError, APIError, LogError, OSError, TimeoutError) as error:
                _log.debug("consumers_not_seen", error=repr(error))

    async def sweep(self) -> int:
        """Take away what is astray now; how many there were. Raises errors of NATS."""
        js = self._client.jetstream()
        before = self.removed
        for stream in self._streams:
            found: list[ConsumerInfo] = []
            try:
                while len(found) % _PAGE == 0:
                    page = await js.consumers_info(stream, len(found))
                    found += page
                    if not page:
                        break
            except NotFoundError:
                # There are no snapshots yet.
                continue
            for info in found:
                wrong = astray(info)
                if wrong:
                    _log.warning(
                        "consumer_removed", stream=stream, consumer=info.name, key=owner_of(info.name), reason=wrong,
                        delivers_to=info.config.deliver_subject,
                        remedy="`kvplane auth list` shows whose key it is; `kvplane auth remove` takes it back",
                    )  # fmt: skip
                    # Another coordinator, or its owner, may have been first.
                    with suppress(NotFoundError):
                        await js.delete_consumer(stream, info.name)
                        self.removed += 1
        return self.removed - before
