"""The coordinator: changes nodes, places blocks on managed nodes, concludes who is lost. Start as many as you like.

There is no leader. A command is decided on the fold, committed with the subject's last sequence as expectation, and
answered after the acknowledgement was read back and the fold judged it. The loser of a race reads on and decides again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import anyio
import msgspec
import structlog

from kvplane.events.errors import BadName, CommitTooLarge, KvplaneError, LogUnavailable, LostRace
from kvplane.events.hashing import unpack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.servers import in_cluster
from kvplane.events.log.stream import COPIES
from kvplane.events.subjects import heartbeat_subject
from kvplane.projections.overview import node_row
from kvplane.services.control import admission, commands, formats
from kvplane.services.control.liveness import Liveness
from kvplane.services.control.registrations import Registrations
from kvplane.services.control.unreported import Unreported
from kvplane.services.process.version import package_version
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest, Conflict, LogAway, UnknownModel
from kvplane.services.protocol.status import CoordinatorStatus, ServerStatus
from kvplane.services.replication.checkpoints import SCHEDULE, Schedule
from kvplane.services.replication.compaction import LOOK_SECONDS as SNAPSHOT_LOOK_SECONDS
from kvplane.services.replication.compaction import SNAPSHOT_BYTES, SNAPSHOT_COMMITS, Compaction
from kvplane.services.replication.replica import RECENT_SECONDS, Replica
from kvplane.services.roles import one_log
from kvplane.services.roles.engine_hashes import LIMITS as READING_LIMITS
from kvplane.services.roles.engine_hashes import EngineHashes, ReadingLimits
from kvplane.services.roles.readers import ANSWER_SECONDS as READERS_SECONDS
from kvplane.services.roles.readers import QUIET_SECONDS, readers
from kvplane.services.roles.strays import Strays
from kvplane.services.routing.policies import check
from kvplane.services.rpc.readiness import Readiness, readiness
from kvplane.services.rpc.server import serve, serving
from kvplane.services.rpc.tally import Tally

if TYPE_CHECKING:
    from anyio.abc import TaskStatus
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from kvplane.events.codec import Message
    from kvplane.projections.skips import Applied
    from kvplane.services.control.commands import Proposal

ANSWER_SECONDS = 10.0
"""How long a commit is tried, and after lost races decided anew."""
LOOK_SECONDS = 0.25
"""How often silence is looked for."""

_log = structlog.get_logger("kvplane.coordinator")
_decode_heartbeat = msgspec.msgpack.Decoder(messages.Heartbeat).decode

Decide = Callable[[Any, Any], "Proposal | None"]


class _Lock:
    """Lets one decision at a time change one thing; `free` is when the next may begin."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.free = 0.0


class Coordinator:
    """One coordinator of a fleet. `server` gives what the one who runs the server sees of it, if that is this process."""

    role = "coordinator"

    def __init__(
        self, client: Client, fleet: str, *, replicas: int | None = None, snapshot_commits: int = SNAPSHOT_COMMITS,
        snapshot_bytes: int = SNAPSHOT_BYTES, snapshot_look_seconds: float = SNAPSHOT_LOOK_SECONDS,
        recent_seconds: float = RECENT_SECONDS, newest: bool = False,
        server: Callable[[], ServerStatus] | None = None,
        answer_seconds: float = ANSWER_SECONDS, readers_seconds: float = READERS_SECONDS,
        reading: ReadingLimits = READING_LIMITS, schedule: Schedule = SCHEDULE,
        trust_history: bool = False,
    ) -> None:  # fmt: skip
        self.client = client
        self._answer_seconds, self._readers_seconds = answer_seconds, readers_seconds
        self._server = server
        self.fleet = fleet
        self.writer = new_writer("coordinator")
        self.unreported = Unreported()
        self.replica = Replica(
            client,
            fleet,
            self._observe,
            writer=self.writer,
            recent_seconds=recent_seconds,
            schedule=schedule,
            trust_history=trust_history,
        )
        self.state = self.replica.state
        self.compaction = Compaction(
            client, self.replica, commits=snapshot_commits, size=snapshot_bytes, look_seconds=snapshot_look_seconds
        )
        self.liveness = Liveness()
        self.registrations = Registrations()
        self.races_lost = 0
        self.conclusions = {"lost": 0, "recovered": 0, "failed": 0}
        """What it concluded of nodes from their heartbeats; `failed` are those that could not be committed."""
        self.bad_heartbeats = 0
        self.tally = Tally()
        self.serving = False
        self.engine_hashes = EngineHashes(client, fleet, f"kv.{fleet}.coordinator.{self.writer}.piece", reading)
        self.strays = Strays(client, fleet)
        self._replicas = replicas
        self._log_created = 0.0
        self._newest = newest
        """Whether a log that has nothing yet begins in the newest format: nobody older reads it."""
        self.appender = Appender(client, fleet, self.writer)
        self.most_tries = 0
        """How often the unluckiest decision was made."""
        # Each lives as long as someone holds it or waits for it.
        self._locks: WeakValueDictionary[str, _Lock] = WeakValueDictionary()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled; creates the fleet's log when there is none, on a cluster in `COPIES`."""
        replicas = self._replicas or (COPIES if in_cluster(self.client) else 1)
        self._log_created = await one_log.created(self.client, self.fleet, replicas)
        async with anyio.create_task_group() as group:
            group.start_soon(self.replica.run)
            await self.replica.follower.caught_up.wait()
            if self._newest and not self.state.sequence:
                await self._begin_newest()
            await group.start(self.engine_hashes.run)
            await self.client.subscribe(f"kv.{self.fleet}.pulse.*", cb=self._heartbeat)
            await serve(
                self.client, group, "kvplane-coordinator", f"coordinates fleet {self.fleet}",
                serving("coordinator", self.fleet, self.writer, self._answers()),
                {"fleet": self.fleet, "writer": self.writer}, self.tally,
            )  # fmt: skip
            self.serving = True
            group.start_soon(self._watch)
            group.start_soon(self.compaction.run)
            group.start_soon(self.strays.run)
            _log.info("coordinator_ready", fleet=self.fleet, writer=self.writer, applied=self.state.sequence)
            task_status.started()

    def _answers(self) -> dict[str, Callable[[Any], Any]]:
        """What answers each endpoint."""
        names = self.engine_hashes
        return {
            "node_register": self.register, "register_oneself": self.register,
            "node_cordon": partial(self._change, commands.cordon),
            "node_uncordon": partial(self._change, commands.uncordon),
            "node_remove": partial(self._change, commands.remove),
            "leave": partial(self._change, commands.leave),
            "node_list": self.list_nodes,
            "cache_admit": self.admit, "admit_to_oneself": self.admit,
            "cache_touch": partial(self._change, admission.touch),
            "cache_evict": partial(self._change, admission.evict),
            "node_last": self.node_last, "last_of_oneself": self.node_last,
            "cache_names": names.first, "names_of_oneself": names.first, "piece": names.more,
            "cache_lookup": self.lookup,
            "session_end": self.end_session,
            "policy_set": self.set_policy,
            "format_show": self.show_format, "format_raise": self.raise_format,
            "status": self.status, "status_of_one": self.status,
            "snapshot": self.snapshot, "compact": self.compact,
        }  # fmt: skip

    def readiness(self) -> Readiness:
        """Whether it can decide: not without the log, for what it answers is on it."""
        follower = self.replica.follower
        away = "" if follower.healthy and self.client.is_connected else "the log is away: nothing can be committed"
        return readiness(follower, serving=self.serving, reason=away)

    async def _begin_newest(self) -> None:
        """Have a log that nobody has written on begin in the newest format; of several coordinators one does."""
        proposal = formats.raised(self.state, messages.FormatRequest(), kvplane=package_version())
        if proposal is not None:
            with suppress(LostRace):
                await self.appender.append(
                    proposal.subject(self.fleet), [proposal.event], expected=0, give_up=self._answer_seconds
                )

    async def commit(self, decide: Decide, request: object, thing: str) -> tuple[Proposal | None, int]:
        """Decide and commit until the fold accepts it; what was committed and its sequence. `thing` names what it changes.

        One decision at a time for each thing: deciding side by side on one node would only lose races.
        """
        mine = self._locks.setdefault(thing, _Lock())
        async with mine.lock:
            await anyio.sleep_until(mine.free)
            give_up = anyio.current_time() + self._answer_seconds
            tries = 0
            while (begin := anyio.current_time()) < give_up:
                tries += 1
                self.most_tries = max(self.most_tries, tries)
                based_on = self.state.sequence
                proposal = decide(self.state, request)
                if proposal is None:
                    return None, based_on
                target = proposal.subject(self.fleet)
                deciding = proposal.topic in {"node", "cache"}
                try:
                    sequence = await self.appender.append(
                        target,
                        [proposal.event],
                        expected=self.state.head(target) if deciding else None,
                        based_on=based_on if deciding else None,
                        give_up=self._answer_seconds,
                    )
                except LostRace:
                    self.races_lost += 1
                    await self.replica.reached(based_on + 1)
                    continue
                except CommitTooLarge as error:
                    raise BadRequest(
                        f"what is asked for does not fit into one commit ({error}); ask for less at once"
                    ) from None
                except LogUnavailable as error:
                    raise LogAway(f"the log does not acknowledge: {error}") from error
                await self.replica.reached(sequence)
                skipped = self.replica.skipped(sequence)
                if skipped is None:
                    if tries > 1:
                        # Others race for it: let them have as long a time as this took, or the fastest would win for ever.
                        mine.free = 2 * anyio.current_time() - begin
                    return proposal, sequence
                self.races_lost += 1
            raise Conflict(f"{thing!r} changed {tries} times while this was decided; try again later")

    async def _change(
        self, decide: Decide, request: messages.NodeRequest | messages.BlocksRequest | messages.LeaveRequest
    ) -> dict[str, object]:
        self.replica.check_ready()
        messages.names((request.node, "node"))
        proposal, sequence = await self.commit(decide, request, request.node)
        return {"node": request.node, "changed": proposal is not None, "sequence": sequence}

    async def register(self, request: messages.RegisterRequest) -> dict[str, object]:
        """Register a node; its epoch is in the answer."""
        self.replica.check_ready()
        # What would be refused anyway does not count, nor is it remembered.
        commands.register(self.state, request)
        self.registrations.register(request.node, time.monotonic())
        _, sequence = await self.commit(commands.register, request, request.node)
        return {"node": request.node, "epoch": sequence, "sequence": sequence, "format": self.state.format}

    async def node_last(self, request: messages.NodeRequest) -> messages.NodeLast:
        """The log's last commit about a node itself, and its format."""
        return msgspec.structs.replace(await self.engine_hashes.last(request), format=self.state.format)

    async def admit(self, request: messages.AdmitRequest) -> dict[str, object]:
        """Place blocks on a managed node."""
        self.replica.check_ready()
        messages.names((request.model, "model"))
        proposal, sequence = await self.commit(admission.admit, request, request.node or f"model {request.model}")
        if proposal is None:
            return {"node": request.node, "evicted": b"", "sequence": sequence}
        node = self.state.nodes.get(proposal.name)
        return {
            "node": proposal.name,
            "address": node.registered.address if node else "",
            "stored_blocks": len(request.hashes) // 8,
            "evicted": proposal.event.evicted,  # type: ignore[attr-defined]
            "sequence": sequence,
        }

    async def end_session(self, request: messages.SessionRequest) -> dict[str, object]:
        """End a session."""
        self.replica.check_ready()
        messages.names((request.model, "model"), (request.session, "session"))
        proposal, sequence = await self.commit(commands.end_session, request, f"session {request.session}")
        return {"session": request.session, "changed": proposal is not None, "sequence": sequence}

    async def set_policy(self, request: messages.PolicyRequest) -> dict[str, object]:
        """Change the policy of all routers."""
        messages.names((request.policy, "policy"))
        check(request.policy, request.parameters)
        _, sequence = await self.commit(commands.set_policy, request, "policy")
        return {"policy": request.policy, "sequence": sequence}

    async def show_format(self, request: messages.StatusRequest) -> dict[str, object]:  # noqa: ARG002 - nothing to choose
        """The log's format in force, and who reads which."""
        self.replica.check_ready()
        found = await readers(self.client, self.fleet, seconds=self._readers_seconds, quiet=QUIET_SECONDS)
        return {"format": self.state.format, "readers": found}

    async def raise_format(self, request: messages.FormatRequest) -> dict[str, object]:
        """Raise the log's format."""
        self.replica.check_ready()
        raised = partial(formats.raised, kvplane=package_version())
        wanted = raised(self.state, request)
        if wanted is not None and not request.force:
            found = await readers(self.client, self.fleet, seconds=self._readers_seconds)
            formats.check_readers(found, wanted.event.format)  # type: ignore[attr-defined]
        proposal, sequence = await self.commit(raised, request, "format")
        return {"format": self.state.format, "changed": proposal is not None, "sequence": sequence}

    async def list_nodes(self, request: messages.ListRequest) -> dict[str, object]:
        """Nodes with their state, load and last heartbeat."""
        self.replica.check_ready()
        rows = []
        for name, node in sorted(self.state.nodes.items()):
            if request.model and request.model not in node.registered.models:
                continue
            heartbeat = self.liveness.heartbeats.get(name)
            rows.append(
                {
                    **node_row(self.state, node),
                    "waiting": heartbeat.waiting if heartbeat else None,
                    # An adapter knows by the engine's metrics; where there are none, the log's completions show it.
                    "unheard": bool(heartbeat and heartbeat.unheard) or self.unreported.silent(name, time.monotonic()),
                    **({"inexact": heartbeat.inexact} if heartbeat and heartbeat.inexact else {}),
                }
            )
        return {"fleet": self.fleet, "sequence": self.state.sequence, "nodes": rows}

    async def lookup(self, request: messages.LookupRequest) -> dict[str, object]:
        """Leading blocks that each node holds, in its fastest tier."""
        self.replica.check_ready()
        messages.names((request.model, "model"))
        serving = [node for node in self.state.nodes.values() if request.model in node.registered.models]
        if not serving:
            raise UnknownModel(f"no node serves model {request.model[:80]!r}")
        matches: dict[str, int] = {}
        for cache_model in dict.fromkeys(node.model for node in serving):
            lengths = self.state.caches.index(cache_model).match(request.hashes)
            nodes = [node for node in serving if node.model == cache_model and "gpu" in node.slots]
            held = [lengths[node.slots["gpu"]] for node in nodes]
            served = self.state.caches.groups.limit(nodes, held, request.hashes)
            matches.update(zip([node.name for node in nodes], served, strict=True))
        blocks = len(unpack_hashes(request.hashes))
        return {"model": request.model, "blocks": blocks, "matches": matches, "sequence": self.state.sequence}

    async def status(self, request: messages.StatusRequest) -> CoordinatorStatus:
        """What this coordinator is and knows."""
        server = None if self._server is None else self._server()
        return await self.replica.about(
            CoordinatorStatus,
            digests=request.digest,
            races_lost=self.races_lost,
            most_tries=self.most_tries,
            server=server,
            log_created=self._log_created,
        )

    async def snapshot(self, request: messages.StatusRequest) -> dict[str, object]:  # noqa: ARG002 - nothing to choose
        """Take a snapshot of the fold."""
        self.replica.check_ready()
        return await self.compaction.take()

    async def compact(self, request: messages.CompactRequest) -> dict[str, object]:
        """Purge what of the log is no longer needed."""
        return await self.compaction.compact(without_history=request.without_history)

    def _observe(self, _: Message, applied: Applied) -> None:
        if applied.commit is not None:
            self.unreported.observe(self.state, applied.commit, time.monotonic())

    async def _heartbeat(self, message: Msg) -> None:
        try:
            heartbeat = _decode_heartbeat(message.data)
        except (msgspec.DecodeError, RecursionError) as error:
            self.bad_heartbeats += 1
            _log.warning("bad_heartbeat", subject=message.subject, error=str(error))
            return
        try:
            spoken_for = heartbeat_subject(self.fleet, heartbeat.node)
        except BadName:
            return
        if message.subject == spoken_for:
            self.liveness.observe(self.state, heartbeat, time.monotonic())

    async def _watch(self) -> None:
        """Conclude who is lost and who is back."""
        reconnects = -1
        looked = time.monotonic()
        while True:
            now = time.monotonic()
            # A process that was stopped wakes up with the heartbeats of that time still unread.
            deaf = now - looked > 4 * LOOK_SECONDS or not (self.client.is_connected and self.replica.follower.healthy)
            if deaf or self.client.stats["reconnects"] != reconnects:
                reconnects = self.client.stats["reconnects"]
                self.liveness.listen(now)
            for name in self.liveness.asleep(self.state):
                if await self._conclude(commands.lost, name, "its engine sleeps"):
                    self.liveness.concluded(name)
            silent = self.liveness.silent(self.state, now)
            if silent:
                # One at a time: the next is judged anew, with the heartbeats that came meanwhile.
                name, quiet = silent[0]
                if await self._conclude(commands.lost, name, f"no heartbeat for {quiet:.1f} s"):
                    self.liveness.concluded(name)
            for name in self.liveness.back(self.state, now):
                await self._conclude(commands.recovered, name, "")
            self.liveness.forget(self.state)
            looked = time.monotonic()
            await anyio.sleep(LOOK_SECONDS)

    async def _conclude(self, decide: Decide, name: str, reason: str) -> bool:
        """Commit a conclusion; false when it was not to be had."""
        try:
            proposal, sequence = await self.commit(decide, messages.NodeRequest(node=name, reason=reason), name)
        except KvplaneError as error:
            self.conclusions["failed"] += 1
            _log.warning("conclusion_failed", node=name, error=str(error))
            return False
        if proposal is not None:
            self.conclusions["lost" if decide is commands.lost else "recovered"] += 1
            event = type(proposal.event).__name__
            _log.warning("node_concluded", node=name, conclusion=event, reason=reason, sequence=sequence)
        return True
