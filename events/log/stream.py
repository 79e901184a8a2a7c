"""The fleet's stream: how it is created, and what must be true of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from events.errors import LogCorrupt, LogMissing, LogUnavailable
from events.subjects import stream_name, stream_subjects

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.api import StreamInfo, StreamState

DUPLICATE_WINDOW_SECONDS = 120
"""How long the server remembers message ids. Duplicates beyond it are known by the writer's counter."""


def stream_config(fleet: str, *, replicas: int = 1) -> StreamConfig:
    """Settings of a fleet's stream: on disk, nothing deleted, writers refused rather than history dropped."""
    return StreamConfig(
        name=stream_name(fleet),
        description=f"kvplane log of fleet {fleet}",
        subjects=stream_subjects(fleet),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        num_replicas=replicas,
        duplicate_window=DUPLICATE_WINDOW_SECONDS,
        deny_delete=True,
        allow_direct=True,
    )


async def open_stream(js: JetStreamContext, fleet: str, *, replicas: int = 1, create: bool = False) -> StreamState:
    """State of the fleet's stream, created if asked for.

    Raises `LogMissing`, `LogUnavailable`, or `LogCorrupt` when it isn't the stream that kvplane needs.
    """
    name = stream_name(fleet)
    try:
        info = await js.stream_info(name)
    except NotFoundError:
        if not create:
            raise LogMissing(
                f"fleet {fleet!r} has no log yet; `kvplane up` or `kvplane coordinator` creates it"
            ) from None
        try:
            info = await js.add_stream(stream_config(fleet, replicas=replicas))
        except (APIError, NatsError) as error:
            raise LogUnavailable(f"the log of fleet {fleet!r} could not be created: {error}") from error
    except ServiceUnavailableError:
        raise LogMissing("the server has no JetStream; start it with `kvplane up` or with -js") from None
    except (APIError, NatsError) as error:
        raise LogUnavailable(f"the log of fleet {fleet!r} does not answer: {error!r}") from error
    _check(fleet, info)
    return info.state


def _check(fleet: str, info: StreamInfo) -> None:
    config, state = info.config, info.state
    wrong = []
    if config.storage != StorageType.FILE:
        wrong.append("storage is not file")
    if not config.deny_delete:
        wrong.append("messages may be deleted (deny_delete is off)")
    if config.discard != DiscardPolicy.NEW:
        wrong.append("old messages may be discarded (discard is not new)")
    if sorted(config.subjects or []) != sorted(stream_subjects(fleet)):
        wrong.append(f"subjects are {config.subjects}")
    if config.max_age or (config.max_msgs_per_subject or -1) > 0:
        wrong.append("messages may expire (max_age or max_msgs_per_subject is set)")
    if wrong:
        raise LogCorrupt(f"stream {config.name} can't be a log: {'; '.join(wrong)}; recreate it with `kvplane up`")
    if state.num_deleted:
        raise LogCorrupt(
            f"stream {config.name} has {state.num_deleted} deleted messages between {state.first_seq} and "
            f"{state.last_seq}; restore it from a replica or a backup"
        )
