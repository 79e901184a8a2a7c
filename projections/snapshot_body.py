"""The body of a snapshot: the parts of a state in forms that are written and read as they are.

The index is kept as its segments: a run of hashes and its holders are a few byte strings, not an object a hash. What is
put together was checked as far as the fold and the decisions rely on it: slots and places are there and have one owner
each, every block has a holder, and load is that of the requests. Each function that finds something else raises
`ValueError` or what Python raises.
"""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, field

from kvplane.events.allowance import ALLOWANCE_FORMAT
from kvplane.events.codec import validate
from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.events.subjects import Place
from kvplane.events.types import NodeRegistered, Tier  # noqa: TC001 - msgspec looks them up as it decodes
from kvplane.events.versions import FORMAT
from kvplane.projections.contexts import Context, Talk  # noqa: TC001 - as those of the log
from kvplane.projections.held import Held, begun
from kvplane.projections.load import COLUMNS, Active, Early, Prefills
from kvplane.projections.nodes import Node
from kvplane.projections.prefix import PrefixIndex
from kvplane.projections.recency import Recency
from kvplane.projections.segment import HASH_BYTES
from kvplane.projections.sessions import Session
from kvplane.projections.snapshot_groups import GroupsPart, groups_of, put_groups
from kvplane.projections.snapshot_segments import MOST_SLOTS, Part, SegmentPart, broken, segments, segments_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvplane.projections.fleet import FleetState
    from kvplane.projections.load import Load


class NodePart(Part):
    """One node and the numbers of its slots."""

    registered: NodeRegistered
    epoch: int
    changed: int
    lost: str | None
    cordoned: bool
    slots: dict[Tier, int]


class IndexPart(Part):
    """The index of a model, with how many slots it has."""

    model: str
    slots: int
    segments: list[SegmentPart]


class SessionPart(Part, gc=False):
    """One session."""

    model: str
    session: str
    node: str
    since: int
    was: str


class PrefillsPart(Part):
    """The prompts that one node computes."""

    waiting: dict[str, int]
    ends: dict[bytes, str]
    since: float


class LoadPart(Part):
    """Load, with its columns 8 bytes a place, those of nodes that left included."""

    ordinals: dict[str, int]
    free: list[int]
    columns: dict[str, bytes]
    prefills: list[PrefillsPart]
    running: dict[str, Active]
    ratio: float
    all_said: float
    all_took: float
    routed_recently: int
    routed_half: int
    half_began: int
    early: dict[str, Early]


class RecencyPart(Part):
    """Blocks in order of use, the protected ones, and how many requests use each of those; 8 bytes each."""

    order: bytes
    protected: bytes
    uses: bytes


class Body(Part):
    """All of a state but what its header says."""

    nodes: list[NodePart]
    indexes: list[IndexPart]
    sessions: list[SessionPart]
    load: LoadPart
    recency: dict[str, RecencyPart]
    format: Annotated[int, Meta(ge=1)]
    policy: str
    parameters: dict[str, float]
    commits: int
    skipped: dict[str, int]
    ignored: dict[str, int]
    writers: list[tuple[str, str, int]]
    removed: dict[str, int]
    heads: dict[str, int]


class BodyWithContexts(Body):
    """That of a log in which contexts are kept: they come last, so that snapshots of earlier logs stay what they were."""

    contexts: list[tuple[bytes | int, Context]] = field(default_factory=list)


class BodyWithAllowances(BodyWithContexts):
    """That of a log in which nodes are held to what they may write."""

    allowances: dict[str, int] = field(default_factory=dict)


class HeldPart(Part):
    """Who is held, what was let in of late and the conversations that were heard of."""

    queue: list[tuple[str, Held]]
    let_in: int
    let_in_half: int
    half_began: int
    talks: list[tuple[bytes | int, Talk]]


class BodyWithHeld(BodyWithAllowances):
    """That of a log whose policy holds requests."""

    held: HeldPart | None = None


class BodyWithGroups(BodyWithHeld):
    """That of a log with nodes of hybrid models."""

    groups: list[GroupsPart] = field(default_factory=list)


def take(state: FleetState) -> Body:
    """The parts of a state. They share its dictionaries: encode them before the state goes on."""
    caches = state.caches
    slots = sum(len(caches.owners(model)) for model in caches.by_model)
    if slots > MOST_SLOTS:
        broken(f"the fleet has {slots} slots, a snapshot holds {MOST_SLOTS}")
    return _form(state)(
        nodes=[
            NodePart(node.registered, node.epoch, node.changed, node.lost, node.cordoned, node.slots)
            for node in state.nodes.values()
        ],
        indexes=[
            IndexPart(model, len(caches.owners(model)), segments_of(index)) for model, index in caches.by_model.items()
        ],
        sessions=[SessionPart(*key, entry.node, entry.since, entry.was) for key, entry in state.sessions.items()],
        load=_load_of(state.load),
        recency={name: _recency_of(recency) for name, recency in state.recency.items()},
        format=state.format,
        policy=state.policy,
        parameters=state.parameters,
        commits=state.commits,
        skipped=state.skipped,
        ignored=state.ignored,
        writers=[(*key, counter) for key, counter in state.writers.items()],
        removed=state.removed,
        heads=state.heads,
    )


def _form(state: FleetState) -> Callable[..., Body]:
    """The shape that the log's format has, with what it has beside those before it."""
    contexts = list(state.load.contexts.items())
    if state.caches.groups.by_model:
        held = _held_of(state) if state.holding else None
        groups = groups_of(state)
        return partial(BodyWithGroups, contexts=contexts, allowances=state.allowances, held=held, groups=groups)
    if state.holding:
        return partial(BodyWithHeld, contexts=contexts, allowances=state.allowances, held=_held_of(state))
    if state.format >= ALLOWANCE_FORMAT:
        return partial(BodyWithAllowances, contexts=contexts, allowances=state.allowances)
    return partial(BodyWithContexts, contexts=contexts) if state.load.contexts.kept else Body


def _held_of(state: FleetState) -> HeldPart:
    queue, contexts = state.queue, state.load.contexts
    return HeldPart(
        list(queue.items()), queue.let_in, queue.let_in_half, queue.half_began, list(contexts.talks.items())
    )  # fmt: skip


def _load_of(load: Load) -> LoadPart:
    columns = {name: getattr(load, name) for name in COLUMNS}
    return LoadPart(
        ordinals=load.ordinal,
        free=load.free,
        columns={name: struct.pack(f"<{len(column)}{column.typecode}", *column) for name, column in columns.items()},
        prefills=[PrefillsPart(prefills.waiting, prefills.ends, prefills.since) for prefills in load.prefills],
        running=load.running,
        early=load.early,
        ratio=load.ratio,
        all_said=load.all_said,
        all_took=load.all_took,
        routed_recently=load.routed_recently,
        routed_half=load.routed_half,
        half_began=load.half_began,
    )


def _recency_of(recency: Recency) -> RecencyPart:
    protected = recency.protected
    return RecencyPart(pack_hashes(recency.order), pack_hashes(protected), pack_hashes(protected.values()))


def put(state: FleetState, body: Body) -> None:
    """Give a new state these parts."""
    if body.format > FORMAT:
        raise ValueError(f"it is of a log in format {body.format}, this kvplane reads up to format {FORMAT}")
    state.format, state.policy, state.parameters = body.format, body.policy, body.parameters
    state.commits, state.skipped, state.ignored = body.commits, body.skipped, body.ignored
    state.writers = {(subject, writer): counter for subject, writer, counter in body.writers}
    state.removed, state.heads = body.removed, body.heads
    for part in body.nodes:
        event = part.registered
        validate(Place("node", event.node), [event])
        state.nodes[event.node] = Node(
            name=event.node, registered=event, epoch=part.epoch, changed=part.changed, lost=part.lost,
            cordoned=part.cordoned, slots=part.slots,
        )  # fmt: skip
    if len(state.nodes) != len(body.nodes):
        broken("a node is there twice")
    _put_caches(state, body.indexes)
    put_groups(state, body.groups if isinstance(body, BodyWithGroups) else [])
    _put_load(state, body.load)
    _put_contexts(state, body.contexts if isinstance(body, BodyWithContexts) else [])
    if isinstance(body, BodyWithAllowances):
        _put_allowances(state, body.allowances)
    _put_held(state, body.held if isinstance(body, BodyWithHeld) else None)
    _put_sessions(state, body.sessions)
    _put_recency(state, body.recency)


def _put_caches(state: FleetState, parts: Sequence[IndexPart]) -> None:
    if sum(part.slots for part in parts) > MOST_SLOTS or any(part.slots < 1 for part in parts):
        broken("there are more slots than there can be")
    owners: dict[str, list[str | None]] = {part.model: [None] * part.slots for part in parts}
    if len(owners) != len(parts):
        broken("a model is there twice")
    for node in state.nodes.values():
        if "gpu" not in node.slots:
            broken("a node has no slot for its GPU")
        for slot in node.slots.values():
            if slot < 0 or owners[node.model][slot] is not None:
                broken("a slot has two nodes")
            owners[node.model][slot] = node.name
    for part in parts:
        index = PrefixIndex()
        index.add_slot(part.slots - 1)
        index.adopt(segments(part.segments, owners[part.model]))
        state.caches.adopt(part.model, index, owners[part.model])


def _put_load(state: FleetState, part: LoadPart) -> None:
    load = state.load
    places = len(part.prefills)
    if sorted([*part.ordinals.values(), *part.free]) != [*range(places)]:
        broken("a node's place in the columns is not its own")
    if part.ordinals.keys() != {name for name, node in state.nodes.items() if node.lost is None}:
        broken("load is not that of the nodes that are there")
    if part.columns.keys() != set(COLUMNS):
        broken("load has other columns")
    for name, packed in part.columns.items():
        code = getattr(load, name).typecode
        setattr(load, name, array(code, struct.unpack(f"<{places}{code}", packed)))
    load.ordinal = part.ordinals
    load.free = part.free
    for each in part.prefills:
        prefills = Prefills()
        prefills.waiting, prefills.ends, prefills.since = each.waiting, each.ends, each.since
        load.prefills.append(prefills)
    load.running = part.running
    load.in_format(state.format)
    load.running_bytes = sum(len(active.hashes) for active in part.running.values())
    load.early = OrderedDict(part.early)
    load.ratio, load.all_said, load.all_took = part.ratio, part.all_said, part.all_took
    load.routed_recently, load.routed_half, load.half_began = part.routed_recently, part.routed_half, part.half_began
    _check_load(load)


def _put_contexts(state: FleetState, parts: list[tuple[bytes | int, Context]]) -> None:
    load = state.load
    live = dict(parts)
    if len(live) != len(parts) or (live and not load.contexts.kept):
        broken("a context is there twice, or in a log that keeps none")
    if any(each.tokens < 0 or each.turns < 1 or each.node not in load.ordinal for each in live.values()):
        broken("a context can't be")
    load.contexts.fit(len(load.prefills))
    load.contexts.adopt(parts, load.ordinal)


def _put_allowances(state: FleetState, allowances: dict[str, int]) -> None:
    if allowances and state.format < ALLOWANCE_FORMAT:
        broken("nodes are held to an allowance in a log that knows none")
    state.allowances.update(allowances)


def _put_held(state: FleetState, part: HeldPart | None) -> None:
    contexts = state.load.contexts
    state.queue = begun(state.queue, contexts, state.format, state.parameters)
    if state.holding != (part is not None):
        broken("requests are held where the policy holds none, or the other way round")
    if part is None:
        return
    state.queue.update(part.queue)
    state.queue.let_in, state.queue.let_in_half, state.queue.half_began = part.let_in, part.let_in_half, part.half_began
    state.queue.oldest_word = min((held.renewed for held in state.queue.values()), default=0)
    contexts.talks = dict(part.talks)
    contexts.asked = {request: talk for talk in contexts.talks.values() for request in talk.running}
    if (
        len(state.queue) != len(part.queue)
        or not contexts.talks.keys() <= contexts.keys()
        or not contexts.asked.keys() <= state.load.running.keys()
        or len(contexts.asked) != sum(len(talk.running) for talk in contexts.talks.values())
        or min((held.tokens for held in state.queue.values()), default=0) < 0
    ):
        broken("who is held, or what conversations ask, can't be")


def _check_load(load: Load) -> None:
    """Requests end by the clock before a commit is looked at: what they are taken from must be there."""
    blocks, tokens = dict.fromkeys(load.ordinal, 0), dict.fromkeys(load.ordinal, 0)
    for active in load.running.values():
        blocks[active.node] += active.blocks
        tokens[active.node] += active.tokens
        if len(active.hashes) % HASH_BYTES or min(active.blocks, active.tokens) < 0:
            broken("a request runs that can't be")
    for name, at in load.ordinal.items():
        waiting = load.prefills[at].waiting
        if (load.blocks[at], load.tokens[at]) != (blocks[name], tokens[name]):
            broken("a node's load is not that of its requests")
        if load.pending[at] != sum(waiting.values()) or min(waiting.values(), default=0) < 0:
            broken("a node's pending tokens are not those of its requests")
        if not (load.speed[at] > 0 and load.pace[at] * load.ratio > 0):
            broken("a node has no speed")


def _put_sessions(state: FleetState, parts: Sequence[SessionPart]) -> None:
    entries = {(part.model, part.session): Session(part.node, part.since, part.was) for part in parts}
    if len(entries) != len(parts):
        broken("a session is there twice")
    if not {part.node for part in parts if part.node} <= state.load.ordinal.keys():
        broken("a session is on a node that is not there")
    state.sessions.adopt(entries)


def _put_recency(state: FleetState, parts: dict[str, RecencyPart]) -> None:
    if parts.keys() != {name for name, node in state.nodes.items() if node.managed and node.lost is None}:
        broken("recency is not that of the managed nodes")
    for name, part in parts.items():
        recency = state.recency[name] = Recency()
        recency.order = OrderedDict.fromkeys(unpack_hashes(part.order))
        recency.protected = dict(zip(unpack_hashes(part.protected), unpack_hashes(part.uses), strict=True))
        if len(recency.order) != state.caches.held(state.nodes[name]):
            broken("a managed node holds other blocks than it used")
