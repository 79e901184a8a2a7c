"""What can be seen of a fleet from outside: the log, its servers, and everybody who answers. `doctor` judges it."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp
import anyio
import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError
from nats.js.errors import NotFoundError

from kvplane.events.errors import LogError, LogUnavailable
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name
from kvplane.services.protocol import messages
from kvplane.services.protocol.endpoints import ENDPOINTS
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.protocol.status import CoordinatorStatus, HistoryStatus, ReplicaStatus, RouterStatus
from kvplane.services.rpc.client import ask, of_fleet
from kvplane.services.rpc.unanswered import why

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import RawStreamMsg

ANSWER_SECONDS = 0.5
"""How long everybody has to say that they are there."""
STATUS_SECONDS = 5.0
DIGEST_SECONDS = 60.0
MONITOR_SECONDS = 5.0
TRIES = 5
"""How often replicas that have no checkpoint in common are asked for their digest until they are at one sequence."""

Plain = dict[str, Any]


S = TypeVar("S", RouterStatus, CoordinatorStatus, HistoryStatus)
R = TypeVar("R", RouterStatus, CoordinatorStatus)


class _Answer(Struct, Generic[S]):
    """A status, and the skew of the clock of the service that gave it."""

    status: S
    skew: float


class Examined(Struct, kw_only=True):
    """What was found out.

    A skew is by how many seconds a clock is at least ahead of that of the one who asks; below zero, behind it.
    """

    log: Plain | None = None
    """The stream as the server describes it, with `newest`, the time of its last commit, and `skew`."""
    log_error: str = ""
    max_payload: int = 0
    """Bytes that the server takes in a message; 0 when that is not known."""
    first: int = 1
    """Sequence with which the log begins."""
    account: Plain = {}
    servers: list[Plain] = []
    """What the servers' monitoring endpoints say, or `error`, and what `kvplane up` says of its own."""
    now: float = 0.0
    """Unix seconds of this machine."""
    routers: list[RouterStatus] = []
    coordinators: list[CoordinatorStatus] = []
    nodes: list[Plain] = []
    histories: list[HistoryStatus] = []
    skews: dict[str, float] = {}
    """Skew of each service, by writer or historian."""
    captured: dict[str, str] = {}
    """Streams that are not the fleet's and store its questions, with a subject of theirs."""
    snapshots: list[int] = []
    snapshots_stream: Plain | None = None

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """Routers and coordinators."""
        return [*self.routers, *self.coordinators]


async def examine(client: Client, fleet: str, monitors: Sequence[str] = ()) -> Examined:
    """Ask everything that answers. `monitors` are URLs of servers' monitoring endpoints."""
    found = Examined(now=time.time())
    try:
        found.servers = [await _server(url) for url in monitors]
        js = client.jetstream()
        state = await open_stream(js, fleet)
        found.log = await _described(client, stream_name(fleet))
        found.first = state.first_seq
        found.max_payload = client.max_payload
        newest = await _last(js, fleet, state.last_seq) if state.messages else None
        found.log["newest"] = newest.time.timestamp() if newest is not None and newest.time is not None else 0.0
        found.account = await _json(client, "$JS.API.INFO")
    except LogError as error:
        found.log_error = str(error)
        return found
    except (NatsError, JetStreamError, OSError, ValueError, KeyError) as error:
        found.log_error = f"the log of fleet {fleet!r} does not answer: {error!r}"
        return found
    found.captured = await _captured(client, fleet)
    await _replicas(client, fleet, found)
    found.servers += _embedded(found.coordinators, {server.get("name") for server in found.servers})
    try:
        listed: Plain = await ask(client, f"kv.{fleet}.coordinator.node.list", messages.ListRequest(), seconds=5)
        found.nodes = listed["nodes"]
    except ServiceFault:
        found.nodes = []
    for historian in await _of_fleet(client, "kvplane-historian", fleet, "historian"):
        answer = await _status(client, f"kv.{fleet}.history.{historian}.status", HistoryStatus)
        if answer is not None:
            found.histories.append(answer.status)
            found.skews[historian] = answer.skew
    with suppress(LogUnavailable):
        found.snapshots = await SnapshotStore(client, fleet).sequences()
    if found.snapshots:
        with suppress(NatsError, OSError, ValueError, KeyError):
            found.snapshots_stream = await _described(client, f"OBJ_{stream_name(fleet)}_snapshots")
    return found


async def _last(js: JetStreamContext, fleet: str, sequence: int) -> RawStreamMsg | None:
    """The log's last message; none where it was deleted."""
    with suppress(NotFoundError):
        return await js.get_msg(stream_name(fleet), sequence)
    return None


async def _captured(client: Client, fleet: str) -> dict[str, str]:
    """Streams of others that store what services are asked."""
    found: dict[str, str] = {}
    for subject in sorted({spec.pattern(fleet) for spec in ENDPOINTS}):
        with suppress(NatsError, OSError, TimeoutError, msgspec.DecodeError, KeyError, TypeError):
            body = msgspec.json.encode({"subject": subject})
            answer = await client.request("$JS.API.STREAM.NAMES", body, timeout=STATUS_SECONDS)
            for stream in msgspec.json.decode(answer.data).get("streams") or ():
                found.setdefault(stream, subject)
    found.pop(stream_name(fleet), None)
    return found


async def _json(client: Client, subject: str) -> Plain:
    """The server's own answer: the client's types leave out its clock and the state of copies."""
    answer: Plain = msgspec.json.decode((await client.request(subject, b"", timeout=STATUS_SECONDS)).data)
    return answer


async def _described(client: Client, stream: str) -> Plain:
    """A stream's description, with the skew of the server's clock."""
    begin = time.time()
    described = await _json(client, f"$JS.API.STREAM.INFO.{stream}")
    clock = datetime.fromisoformat(described["ts"]).timestamp()
    return {**described, "clock": clock, "skew": _skew(clock, begin, time.time())}


def _skew(clock: float, begin: float, end: float) -> float:
    """By how much a clock that was read between two moments is at least ahead (or, below zero, behind)."""
    return clock - end if clock > end else min(0.0, clock - begin)


async def _server(url: str) -> Plain:
    """What a server's monitoring endpoint says of its storage. Its path may be a secret, as a login is."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        timeout = aiohttp.ClientTimeout(total=MONITOR_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url.rstrip('/')}/varz") as answer:
            answer.raise_for_status()
            varz: Plain = msgspec.json.decode(await answer.read())
            return {"url": shown, "name": varz["server_name"], "version": varz["version"], **varz.get("jetstream", {})}
    except aiohttp.ClientResponseError as error:
        if error.status >= 400:
            return {
                "url": shown,
                "error": f"/varz there answers {error.status}; --monitor is a server's http_port",
            }
        return {"url": shown, "error": (await why(url, error)).reason}
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return {"url": shown, "error": (await why(url, error)).reason}
    except (ValueError, KeyError):
        return {
            "url": shown,
            "error": "/varz there is not that of a NATS server; --monitor is a server's http_port",
        }


def _embedded(coordinators: list[CoordinatorStatus], known: set[str | None]) -> list[Plain]:
    """Servers of `kvplane up`, as the process that runs each of them says."""
    reported = {status.server.name: status.server for status in coordinators if status.server is not None}
    return [
        {
            "url": server.url, "name": name, "disk_free": server.disk_free, "full": server.full,
            "config": {"sync_always": server.sync_always, "max_storage": server.max_storage},
        }
        for name, server in reported.items() if name not in known
    ]  # fmt: skip


async def _replicas(client: Client, fleet: str, found: Examined) -> None:
    """Statuses of routers and of coordinators, with digests of one sequence if that can be had."""

    async def subjects(kind: str) -> list[str]:
        writers = await _of_fleet(client, f"kvplane-{kind}", fleet, "writer")
        return [f"kv.{fleet}.{kind}.{writer}.status" for writer in writers]

    routers, coordinators = await subjects("router"), await subjects("coordinator")
    of_routers = await _statuses(client, routers, RouterStatus)
    of_coordinators = await _statuses(client, coordinators, CoordinatorStatus)
    found.routers = [answer.status for answer in of_routers]
    found.coordinators = [answer.status for answer in of_coordinators]
    found.skews |= {answer.status.writer: answer.skew for answer in of_routers}
    found.skews |= {answer.status.writer: answer.skew for answer in of_coordinators}
    for _ in range(TRIES):
        known = [set(status.checkpoints) for status in found.replicas]
        if not known or set.intersection(*known):
            break
        # All at once: the sooner they are asked one after the other, the likelier they are at one sequence.
        asked: dict[str, Any] = {}
        async with anyio.create_task_group() as group:
            group.start_soon(_again, client, routers, RouterStatus, asked)
            group.start_soon(_again, client, coordinators, CoordinatorStatus, asked)
        found.routers = [asked.get(status.writer, status) for status in found.routers]
        found.coordinators = [asked.get(status.writer, status) for status in found.coordinators]
        if len({status.sequence for status in found.replicas}) < 2:
            break
        await anyio.sleep(0.1)


async def _again(client: Client, subjects: list[str], form: type[R], asked: dict[str, Any]) -> None:
    for answer in await _statuses(client, subjects, form, digest=True):
        asked[answer.status.writer] = answer.status


async def _statuses(client: Client, subjects: list[str], form: type[S], *, digest: bool = False) -> list[_Answer[S]]:
    found: dict[str, _Answer[S]] = {}

    async def one(subject: str) -> None:
        if (answer := await _status(client, subject, form, digest=digest)) is not None:
            found[subject] = answer

    async with anyio.create_task_group() as group:
        for subject in subjects:
            group.start_soon(one, subject)
    return [found[subject] for subject in subjects if subject in found]


async def _status(client: Client, subject: str, form: type[S], *, digest: bool = False) -> _Answer[S] | None:
    begin = time.time()
    try:
        seconds = DIGEST_SECONDS if digest else STATUS_SECONDS
        status = await ask(client, subject, messages.StatusRequest(digest=digest), form, seconds=seconds)
    except ServiceFault:
        return None
    clock: float = status.clock or begin
    return _Answer(status, _skew(clock, begin, time.time()))


async def _of_fleet(client: Client, service: str, fleet: str, key: str) -> list[str]:
    with suppress(NatsError, TimeoutError, KeyError):
        return [metadata[key] for metadata in await of_fleet(client, service, fleet, seconds=ANSWER_SECONDS)]
    return []
