"""What can be seen of a fleet from outside: the log, its servers, and everybody who answers. `doctor` judges it."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio
import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

from kvplane.events.errors import LogError, LogUnavailable
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask, of_fleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client

ANSWER_SECONDS = 0.5
"""How long everybody has to say that they are there."""
STATUS_SECONDS = 5.0
DIGEST_SECONDS = 60.0
MONITOR_SECONDS = 5.0
TRIES = 5
"""How often replicas that have no checkpoint in common are asked for their digest until they are at one sequence."""

Plain = dict[str, Any]


class Examined(Struct, kw_only=True):
    """What was found out. Statuses are the services' own, with `skew`.

    A skew is by how many seconds a clock is at least ahead of that of the one who asks; below zero, behind it.
    """

    log: Plain | None = None
    """The stream as the server describes it, with `newest`, the time of its last commit, and `skew`."""
    log_error: str = ""
    account: Plain = {}
    servers: list[Plain] = []
    """What the servers' monitoring endpoints say, or `error`."""
    routers: list[Plain] = []
    coordinators: list[Plain] = []
    nodes: list[Plain] = []
    histories: list[Plain] = []
    snapshots: list[int] = []
    snapshots_stream: Plain | None = None

    @property
    def replicas(self) -> list[Plain]:
        """Routers and coordinators."""
        return [*self.routers, *self.coordinators]


async def examine(client: Client, fleet: str, monitors: Sequence[str] = ()) -> Examined:
    """Ask everything that answers. `monitors` are URLs of servers' monitoring endpoints."""
    found = Examined()
    try:
        found.servers = [await _server(url) for url in monitors]
        js = client.jetstream()
        state = await open_stream(js, fleet)
        found.log = await _described(client, stream_name(fleet))
        newest = await js.get_msg(stream_name(fleet), state.last_seq) if state.messages else None
        found.log["newest"] = newest.time.timestamp() if newest is not None and newest.time is not None else 0.0
        found.account = await _json(client, "$JS.API.INFO")
    except LogError as error:
        found.log_error = str(error)
        return found
    except (NatsError, JetStreamError, OSError, ValueError, KeyError) as error:
        found.log_error = f"the log of fleet {fleet!r} does not answer: {error!r}"
        return found
    found.routers, found.coordinators = await _replicas(client, fleet)
    try:
        answer: Plain = await ask(client, f"kv.{fleet}.coordinator.node.list", messages.ListRequest(), seconds=5)
        found.nodes = answer["nodes"]
    except ServiceFault:
        found.nodes = []
    for historian in await _of_fleet(client, "kvplane-historian", fleet, "historian"):
        if history := await _status(client, f"kv.{fleet}.history.{historian}.status"):
            found.histories.append(history)
    with suppress(LogUnavailable):
        found.snapshots = await SnapshotStore(client, fleet).sequences()
    if found.snapshots:
        with suppress(NatsError, OSError, ValueError, KeyError):
            found.snapshots_stream = await _described(client, f"OBJ_{stream_name(fleet)}_snapshots")
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
    """What a server's monitoring endpoint says of its storage."""
    try:
        timeout = aiohttp.ClientTimeout(total=MONITOR_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url.rstrip('/')}/varz") as answer:
            answer.raise_for_status()
            said: Plain = msgspec.json.decode(await answer.read())
            return {"url": url, "name": said["server_name"], "version": said["version"], **said.get("jetstream", {})}
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
        return {"url": url, "error": str(error) or type(error).__name__}


async def _replicas(client: Client, fleet: str) -> tuple[list[Plain], list[Plain]]:
    """Statuses of routers and of coordinators, with digests of one sequence if that can be had."""
    kinds = [
        [f"kv.{fleet}.{kind}.{writer}.status" for writer in await _of_fleet(client, f"kvplane-{kind}", fleet, "writer")]
        for kind in ("router", "coordinator")
    ]
    routers, coordinators = [await _statuses(client, subjects, digest=False) for subjects in kinds]
    for _ in range(TRIES):
        known = [set(status.get("checkpoints", ())) for status in (*routers, *coordinators)]
        if not known or set.intersection(*known):
            break
        # All at once: the sooner they are asked one after the other, the likelier they are at one sequence.
        asked = await _statuses(client, [*kinds[0], *kinds[1]], digest=True)
        by_writer = {status["writer"]: status for status in asked}
        for status in (*routers, *coordinators):
            status |= {key: value for key, value in by_writer.get(status["writer"], {}).items() if key != "skew"}
        if len({status["sequence"] for status in (*routers, *coordinators)}) < 2:
            break
        await anyio.sleep(0.1)
    return routers, coordinators


async def _statuses(client: Client, subjects: list[str], *, digest: bool) -> list[Plain]:
    found: dict[str, Plain] = {}

    async def one(subject: str) -> None:
        if status := await _status(client, subject, digest=digest):
            found[subject] = status

    async with anyio.create_task_group() as group:
        for subject in subjects:
            group.start_soon(one, subject)
    return [found[subject] for subject in subjects if subject in found]


async def _status(client: Client, subject: str, *, digest: bool = False) -> Plain | None:
    begin = time.time()
    try:
        seconds = DIGEST_SECONDS if digest else STATUS_SECONDS
        status: Plain = await ask(client, subject, messages.StatusRequest(digest=digest), seconds=seconds)
    except ServiceFault:
        return None
    return {**status, "skew": _skew(status.get("clock", begin), begin, time.time())}


async def _of_fleet(client: Client, service: str, fleet: str, key: str) -> list[str]:
    with suppress(NatsError, TimeoutError, KeyError):
        return [metadata[key] for metadata in await of_fleet(client, service, fleet, seconds=ANSWER_SECONDS)]
    return []
