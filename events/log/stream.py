"""The fleet's stream: how it is created, and what must be true of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import structlog
from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from kvplane.events.errors import LogMissing, LogUnavailable, LogUnfit
from kvplane.events.subjects import stream_name, stream_subjects

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.api import StreamInfo, StreamState

DUPLICATE_WINDOW_SECONDS = 120
"""How long the server remembers message ids. Duplicates beyond it are known by the writer's counter."""
COPIES = 3
"""Of a log, on a cluster, where nothing else is asked for: any one server may be lost, or restarted, while it goes on."""
MESSAGE_BYTES = 8 << 20
"""So large a message should be taken: the hashes of the longest request fit."""
CREATE_SECONDS = 30.0
"""How long the creation of a log waits for enough servers; those of a cluster don't start in one moment."""

NO_JETSTREAM = "the server has no JetStream; start it with `kvplane up` or with -js"
_NO_CLUSTER = 10074

_log = structlog.get_logger("kvplane.log")


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
    """State of the fleet's stream; when there is none and that is asked for, it is created with so many copies.

    Messages may be missing inside it (`num_deleted`): whoever reads them finds that out. Raises `LogMissing`,
    `LogUnavailable`, or `LogCorrupt` when it isn't the stream that kvplane needs.
    """
    if create:
        await _create(js, fleet, replicas)
    info = await stream_info(js, fleet)
    if sentence := unfit(info, fleet):
        raise LogUnfit(sentence)
    return info.state


async def stream_info(js: JetStreamContext, fleet: str) -> StreamInfo:
    """State, settings and copies of a fleet's stream, whatever they are. Raises `LogMissing` or `LogUnavailable`."""
    try:
        info = await js.stream_info(stream_name(fleet))
    except NotFoundError:
        raise LogMissing(f"fleet {fleet!r} has no log yet; `kvplane up` or `kvplane coordinator` creates it") from None
    except ServiceUnavailableError as error:
        if error.err_code is None:
            raise LogMissing(NO_JETSTREAM) from None
        raise LogUnavailable(f"the log of fleet {fleet!r} is not available: {error.description}") from error
    except (APIError, NatsError) as error:
        raise LogUnavailable(f"the log of fleet {fleet!r} does not answer: {error!r}") from error
    return info


async def _create(js: JetStreamContext, fleet: str, replicas: int) -> None:
    """Create the stream unless it is there."""
    deadline = anyio.current_time() + (CREATE_SECONDS if replicas > 1 else 0)
    warned = False
    while True:
        try:
            if not await _exists(js, fleet):
                await js.add_stream(stream_config(fleet, replicas=replicas))
        except (APIError, NatsError) as error:
            if isinstance(error, ServiceUnavailableError) and error.err_code is None:
                raise LogMissing(NO_JETSTREAM) from None
            code, what = (error.err_code, error.description) if isinstance(error, APIError) else (None, repr(error))
            if code == _NO_CLUSTER:
                raise LogUnavailable(
                    f"a single server can't keep {replicas} copies of the log of fleet {fleet!r}: connect to a cluster of "
                    "so many, or say --replicas 1"
                ) from None
            if anyio.current_time() >= deadline:
                hint = f"; do {replicas} servers of the cluster run?" if replicas > 1 else ""
                raise LogUnavailable(f"the log of fleet {fleet!r} could not be created: {what}{hint}") from error
            if not warned:
                warned = True
                _log.warning("log_creation_waits", fleet=fleet, replicas=replicas, error=what)
            await anyio.sleep(0.5)
        else:
            return


async def _exists(js: JetStreamContext, fleet: str) -> bool:
    try:
        await js.stream_info(stream_name(fleet))
    except NotFoundError:
        return False
    return True


def unfit(info: StreamInfo, fleet: str) -> str:
    """Why a stream can't be the log of a fleet, and what to do; empty when it can."""
    config = info.config
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
    if config.retention != RetentionPolicy.LIMITS:
        wrong.append("messages are deleted once they are read (retention is not limits)")
    if config.allow_rollup_hdrs or config.allow_msg_ttl:
        wrong.append("a message may delete others, or expire (allow_rollup_hdrs or allow_msg_ttl is on)")
    if config.sealed or config.no_ack:
        wrong.append("nothing is stored, or acknowledged, any more (sealed or no_ack is on)")
    if 0 < (config.max_msg_size or -1) < MESSAGE_BYTES:
        wrong.append(f"messages are refused that servers take (max_msg_size is {config.max_msg_size})")
    if config.subject_transform or config.mirror or config.sources:
        wrong.append("it holds other messages than were written (subject_transform, mirror or sources is set)")
    if not wrong:
        return ""
    final = config.storage != StorageType.FILE or config.sealed
    remedy = (
        "that can't be set back: restore the log from a backup, or use another fleet"
        if final
        else f"set that back, as with `nats stream edit {config.name}`; no message is lost by it"
    )
    return f"stream {config.name} can't be a log: {'; '.join(wrong)}; {remedy}"
