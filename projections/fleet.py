"""The state of a fleet: one fold of its log.

`apply` is total. Whatever bytes lie on whatever subject, it either applies a commit whole or skips it whole for a
reason that it counts, and it does the same on every replica. Nothing but the message decides: no clock, no random, no
order of anything but the log. The rules that keep the invariants are here and not in those who write, because writers
can be old, late, wrong or hostile:

- a commit of an epoch that is over, or of a writer that had not seen the node's last change, changes nothing;
- a placement on a managed node that would exceed its capacity, or evict a protected block, changes nothing;
- a writer's counter that does not go up is a duplicate, at any distance.

A decision about a request that names a node that has since gone is not the commit's fault: that one event is ignored
and counted, the others of its commit are applied.

A commit is judged before anything changes: one of several events whole (`_cache`, `judge_formats`), an
event that is alone in its commit by its handler. Events of requests and sessions are never a reason to skip.

When it is not the commit but this process that fails (no memory, an interrupt), the state may hold half a commit that
other replicas hold whole. It says so and is of no use from then on: `Unusable`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events import types
from kvplane.events.allowance import ALLOWANCE_FORMAT
from kvplane.events.codec import Commit, Message, decode
from kvplane.events.errors import BadCommit, NewerFormat
from kvplane.events.hashing import unpack_hashes
from kvplane.events.versions import FORMAT
from kvplane.projections.allowances import Allowances
from kvplane.projections.errors import Unusable
from kvplane.projections.held import Queue, begun
from kvplane.projections.load import Early, Load, prefill_speed
from kvplane.projections.nodes import Caches, Node
from kvplane.projections.recency import Recency
from kvplane.projections.sessions import Sessions
from kvplane.projections.skips import Applied, Skip, judge_formats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WRITERS_LIMIT = 100_000
"""Most (subject, writer) counters remembered; the least recently used are forgotten."""
REMOVED_LIMIT = 100_000
"""Most removed nodes whose last change is remembered."""
HEADS_LIMIT = 100_000
"""Most subjects of nodes and caches whose last sequence is remembered; the one longest without a message is forgotten."""
NODES_LIMIT = 10_000
"""Most nodes of a fleet."""
OVERFULL = 2
"""So many times its capacity a reported node may say to hold: more is a report that lost its removals."""
TIER_LIMIT = 1 << 26
"""Most blocks that one tier of a node may say to hold, whatever it registered; and the last commit's beyond that."""
BACK_SECONDS = 60
"""Log time that goes back further than this was wrong before: a server's clock was set right."""

DEFAULT_POLICY = "ttft"

DEFECTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)
"""What code raises that is wrong for some commit: on every replica alike, since nothing but the log is read. Every other
error may be this process's own: no memory, no stack, an interrupt, an array that somebody else here looks at."""


class FleetState:
    """Everything that routers and coordinators know of one fleet. Only `apply` changes it."""

    def __init__(self, fleet: str) -> None:
        self.fleet = fleet
        self._deciding = (f"kv.{fleet}.node.", f"kv.{fleet}.cache.")
        self.sequence = 0
        self.time = 0
        self.set_back = 0
        """How often log time was set back, as far as this process read the log itself."""
        self.nodes: dict[str, Node] = {}
        self.caches = Caches()
        self.sessions = Sessions()
        self.load = Load()
        self.recency: dict[str, Recency] = {}
        self.queue = Queue()
        """Requests that are held."""
        self.format = 1
        """Format of the log that is in force, see `events.versions`."""
        self.policy = DEFAULT_POLICY
        self.parameters: dict[str, float] = {}
        self.commits = 0
        self.skipped: dict[str, int] = {}
        self.ignored: dict[str, int] = {}
        self.writers: dict[tuple[str, str], int] = {}
        self.removed: dict[str, int] = {}
        self.heads: dict[str, int] = {}
        """Last sequence on each subject of nodes and caches, skipped commits included: what a writer must expect."""
        self.allowances = Allowances(fleet)
        self.failure: Exception | None = None
        """Why this state is of no use any more."""
        self.changes = 0
        """Counts changes of nodes and policy, so that what is derived from them knows when to be made again."""
        self._on_event: dict[type[types.Event], Callable[..., None]] = {
            types.NodeRegistered: self._registered,
            types.NodeCordoned: self._cordoned,
            types.NodeUncordoned: self._cordoned,
            types.NodeLost: self._lost,
            types.NodeRecovered: self._recovered,
            types.NodeRemoved: self._removed,
            types.BlocksPlaced: self._placed,
            types.GroupStored: self._grouped,
            types.GroupRemoved: self._grouped,
            types.SessionAssigned: self._assigned,
            types.SessionEnded: self._ended,
            types.RequestRouted: self._routed,
            types.RequestCompleted: self._completed,
            types.RequestHeld: self._waits,
            types.RequestReleased: self._waits,
            types.PolicyChanged: self._policy_changed,
            types.FormatRaised: self._format_raised,
        }

    def become(self, other: FleetState) -> None:
        """Be the state that another one is, such as a snapshot's. The other must not be used any more."""
        for name, value in vars(other).items():
            if name not in {"fleet", "_deciding", "_on_event"}:
                setattr(self, name, value)

    def head(self, subject: str) -> int | None:
        """Last sequence on a subject of a node or cache, which a writer must expect; none when that was forgotten."""
        return self.heads.get(subject, 0 if len(self.heads) < HEADS_LIMIT else None)

    def apply(self, message: Message) -> Applied:
        """Apply one message of the log. A message at or below `sequence` is a redelivery and changes nothing.

        Raises `NewerFormat` when the log goes on in a format that isn't known here, and `Unusable` when this process
        failed; both again at every later call, since the state is of no use then.
        """
        if self.failure is not None:
            raise self.failure
        if message.sequence <= self.sequence:
            return Applied(None, "redelivered")
        try:
            self.sequence = message.sequence
            self._pass_time(message.time)
            if message.subject.startswith(self._deciding):
                self._head(message.subject)
            commit = self._read(message)
            self._check_writer(message.subject, commit)
            topic = commit.place.topic
            if topic == "cache":
                self._cache(commit)
            else:
                if topic == "node":
                    self._check_based_on(commit)
                elif topic == "control":
                    judge_formats(commit.events, self.sequence, self.format, FORMAT)
                for event in commit.events:
                    self._on_event[type(event)](event)
        except (BadCommit, Skip) as error:
            reason, detail = error.code if isinstance(error, BadCommit) else str(error), str(error)
        except DEFECTS as error:
            # A poisoned commit must not keep every replica from starting.
            reason, detail = "defect", repr(error)
        except NewerFormat as error:
            self.failure = error
            raise
        except BaseException as error:
            self.failure = Unusable(message.sequence, error)
            if isinstance(error, Exception):
                raise self.failure from error
            raise
        else:
            self.commits += 1
            return Applied(commit, None)
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        return Applied(None, reason, detail)

    def _read(self, message: Message) -> Commit:
        """The commit of a message. What a node writes counts against what it may, whatever becomes of it."""
        subject = message.subject
        allowances = self.allowances
        if self.format < ALLOWANCE_FORMAT or not subject.startswith(allowances.by_nodes):
            return decode(self.fleet, message, self.format)
        if allowances.spent(subject, self.time):
            raise Skip("too_fast")
        events: Sequence[types.Event] = ()
        try:
            commit = decode(self.fleet, message, self.format)
            events = commit.events
        finally:
            allowances.take(subject, self.time, events)
        return commit

    def _check_writer(self, subject: str, commit: Commit) -> None:
        if not commit.writer or not commit.writer_seq:
            return
        key = (subject, commit.writer)
        last = self.writers.pop(key, 0)
        self.writers[key] = max(last, commit.writer_seq)
        if commit.writer_seq <= last:
            raise Skip("duplicate")
        if len(self.writers) > WRITERS_LIMIT:
            del self.writers[next(iter(self.writers))]

    def _check_based_on(self, commit: Commit) -> None:
        if commit.based_on is None:
            return
        node = self.nodes.get(commit.place.name)
        changed = self.removed.get(commit.place.name, 0) if node is None else node.changed
        if commit.based_on < changed:
            raise Skip("stale")

    def _pass_time(self, time: int) -> None:
        if time < self.time - BACK_SECONDS * 10**9:
            self.load.set_back(self.time - time)
            self.allowances.set_back(self.time - time)
            self.queue.set_back(self.time - time)
            self.set_back += 1
            self.time = time
        else:
            self.time = max(self.time, time)
        for request in self.load.expired(self.time):
            self._over(request)
        if self.queue:
            self.queue.expire(self.time)

    def _head(self, subject: str) -> None:
        self.heads.pop(subject, None)
        self.heads[subject] = self.sequence
        if len(self.heads) > HEADS_LIMIT:
            del self.heads[next(iter(self.heads))]

    def _ignore(self, reason: str) -> None:
        if reason:
            self.ignored[reason] = self.ignored.get(reason, 0) + 1

    def _node(self, name: str) -> Node:
        node = self.nodes.get(name)
        if node is None:
            raise Skip("unknown_node")
        return node

    def _registered(self, event: types.NodeRegistered) -> None:
        models = set(event.models)
        for other in self.nodes.values():
            shared = other.name != event.node and not models.isdisjoint(other.registered.models)
            if shared and other.registered.block_size != event.block_size:
                raise Skip("block_size")
        before = self.nodes.get(event.node)
        if before is None and len(self.nodes) >= NODES_LIMIT:
            raise Skip("too_many_nodes")
        node = Node(name=event.node, registered=event, epoch=self.sequence, changed=self.sequence, slots={})
        if before is not None:
            self._forget_cache(before)
            self.caches.release(before)
            node.cordoned = before.cordoned
        self.removed.pop(event.node, None)
        self.nodes[event.node] = node
        self._begin(node)

    def _begin(self, node: Node) -> None:
        """A node's cache and load start from nothing."""
        self.load.add_node(node.name, prefill_speed(node.registered.labels))
        self.caches.slot(node, "gpu")
        if node.managed:
            self.recency[node.name] = Recency()
        self.changes += 1

    def _forget_cache(self, node: Node) -> None:
        self.load.node_gone(node.name)
        self.recency.pop(node.name, None)
        self.caches.clear(node)
        self.changes += 1

    def _cordoned(self, event: types.NodeCordoned | types.NodeUncordoned) -> None:
        node = self._node(event.node)
        cordoned = isinstance(event, types.NodeCordoned)
        if node.cordoned is cordoned:
            raise Skip("no_change")
        node.cordoned = cordoned
        node.changed = self.sequence
        self.changes += 1

    def _lost(self, event: types.NodeLost) -> None:
        node = self._node(event.node)
        if node.lost is not None:
            raise Skip("no_change")
        node.lost = event.reason or "lost"
        node.changed = self.sequence
        self._forget_cache(node)
        self.sessions.node_gone(node.name)

    def _recovered(self, event: types.NodeRecovered) -> None:
        node = self._node(event.node)
        if node.lost is None:
            raise Skip("no_change")
        node.lost = None
        node.changed = self.sequence
        self._begin(node)

    def _removed(self, event: types.NodeRemoved) -> None:
        node = self._node(event.node)
        self._forget_cache(node)
        self.caches.release(node)
        self.sessions.node_gone(node.name)
        del self.nodes[node.name]
        self.removed[node.name] = self.sequence
        if len(self.removed) > REMOVED_LIMIT:
            del self.removed[next(iter(self.removed))]

    def _cache(self, commit: Commit) -> None:
        node = self._node(commit.place.name)
        epoch, managed = node.epoch, node.managed
        fitting: types.Tier | None = None
        for event in commit.events:
            if event.epoch != epoch:  # type: ignore[attr-defined]
                raise Skip("stale_epoch")
            kind = type(event)
            if kind is not types.CacheCleared and (kind is types.BlocksPlaced) is not managed:
                raise Skip("wrong_mode")
            if kind is types.BlocksStored:
                if event.tier != fitting:  # type: ignore[attr-defined]
                    fitting = event.tier  # type: ignore[attr-defined]
                    if self._overfull(node, fitting, self.caches.held(node, fitting)):
                        raise Skip("capacity")
            elif kind is types.GroupStored and self._overfull(node, "gpu", self.caches.groups.held(node, event.group)):  # type: ignore[attr-defined]
                raise Skip("capacity")
        if managed:
            # Only on managed nodes do decisions rest on the cache.
            self._check_based_on(commit)
        # It is judged: from here on things change, and nothing is skipped but what is alone in its commit.
        if managed and type(commit.events[0]) is types.CacheCleared:
            node.changed = self.sequence
        caches, slot = self.caches, 0
        tier: types.Tier | None = None
        index = caches.index(node.model)
        awaited = self.load.awaited(node.name)
        for event in commit.events:
            kind = type(event)
            if kind is types.BlocksStored:
                hashes = event.hashes  # type: ignore[attr-defined]
                if hashes:
                    if event.tier != tier:  # type: ignore[attr-defined]
                        tier = event.tier  # type: ignore[attr-defined]
                        slot = caches.slot(node, tier)
                    index.store(slot, hashes, event.parent)  # type: ignore[attr-defined]
                    if awaited:
                        self.load.stored(node.name, hashes[-8:], self.time)
            elif kind is types.BlocksRemoved:
                index.remove(caches.slot(node, event.tier), event.hashes)  # type: ignore[attr-defined]
            elif kind is types.CacheCleared:
                caches.clear(node)
                recency = self.recency.get(node.name)
                if recency is not None:
                    recency.clear()
            else:
                self._on_event[kind](event)

    @staticmethod
    def _overfull(node: Node, tier: types.Tier, held: int) -> bool:
        """Whether the node said already that it holds far more than it can: memory is bounded by what was registered."""
        return held > min(OVERFULL * node.registered.capacity_blocks.get(tier, TIER_LIMIT), TIER_LIMIT)

    def _grouped(self, event: types.GroupStored | types.GroupRemoved) -> None:
        self.changes += self.caches.groups.apply(self.nodes[event.node], event)

    def _placed(self, event: types.BlocksPlaced) -> None:
        node = self.nodes[event.node]
        if node.lost is not None:
            raise Skip("node_lost")
        recency = self.recency[node.name]
        stored, evicted = set(unpack_hashes(event.stored)), unpack_hashes(event.evicted)
        leaving = set(evicted)
        if len(leaving) != len(evicted) or leaving & stored or any(block not in recency.order for block in leaving):
            raise Skip("not_held")
        if any(block in recency.protected for block in leaving):
            raise Skip("protected")
        used = len(recency.order) - len(leaving) + sum(block not in recency.order for block in stored)
        if used > node.registered.capacity_blocks["gpu"]:
            raise Skip("capacity")
        index, slot = self.caches.index(node.model), node.slots["gpu"]
        recency.forget(event.evicted)
        recency.use(event.stored, add=True)
        index.remove(slot, event.evicted)
        if event.stored:
            index.store(slot, event.stored, event.parent)
            self.load.stored(node.name, event.stored[-8:], self.time)
        node.changed = self.sequence

    def _assigned(self, event: types.SessionAssigned) -> None:
        node = self.nodes.get(event.node)
        if node is None or node.lost is not None:
            self._ignore("unknown_node")
            return
        self.sessions.assign(event.model, event.session, event.node, self.sequence)

    def _ended(self, event: types.SessionEnded) -> None:
        self.load.contexts.ended(event.model, event.session, self.load.ordinal)
        if not self.sessions.end(event.model, event.session):
            self._ignore("unknown_session")

    def _routed(self, event: types.RequestRouted) -> None:
        node = self.nodes.get(event.node)
        if node is None or node.lost is not None:
            self._ignore("unknown_node")
            return
        self._over(event.request)
        if self.queue:
            self.queue.let_go(event.request, self.time)
        self.load.routed(event, node.registered.block_size, self.time)
        if event.session:
            self.sessions.touch(event.model, event.session)
        if node.managed and event.hashes:
            recency = self.recency[node.name]
            recency.protect(event.hashes)
            recency.use(event.hashes)
        early = self.load.early_end(event)
        if early is not None:
            self._over(event.request, served=early.served)

    def _completed(self, event: types.RequestCompleted) -> None:
        served = event.status == "ok"
        if not self._over(event.request, served=served):
            self._ignore("unknown_request")
            self.load.ended_early(event.request, Early(event.node, self.time, served))

    def _over(self, request: str, *, served: bool = False) -> bool:
        active = self.load.completed(request, self.time, served=served)
        if active is None:
            return False
        recency = self.recency.get(active.node)
        if recency is not None and active.hashes:
            recency.release(active.hashes)
        return True

    @property
    def holding(self) -> bool:
        """Whether requests are held where the caches have no room for their contexts."""
        return self.load.contexts.listening

    def _waits(self, event: types.RequestHeld | types.RequestReleased) -> None:
        self._ignore(self.queue.heard(event, self.time) if self.holding else "not_holding")

    def _policy_changed(self, event: types.PolicyChanged) -> None:
        self.policy = event.policy
        self.parameters = dict(event.parameters)
        self.changes += 1
        self.queue = begun(self.queue, self.load.contexts, self.format, self.parameters)

    def _format_raised(self, event: types.FormatRaised) -> None:
        self.format = event.format
        self.load.in_format(event.format)
        self.queue = begun(self.queue, self.load.contexts, self.format, self.parameters)
