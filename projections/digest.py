"""The digest of a fleet's state: 128 bits that are equal on every replica at equal sequence.

It is made from what the state *says*, never from how it is stored: segments, slots and dictionary layouts may differ
between a replica that replayed from zero and one that started elsewhere. Where order has a meaning (least recently used
first) it is part of the digest; where it has none, names and hashes are sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
from msgspec.structs import astuple
from xxhash import xxh3_128

from kvplane.events.allowance import ALLOWANCE_FORMAT
from kvplane.events.hashing import pack_hashes

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState


MALFORMED = ("undecodable", "unknown_type", "invalid")


def digest(state: FleetState) -> str:
    """Digest of the state, as 32 hex digits. Most of the time goes into sorting memberships: 0.05 s a million."""
    hasher = xxh3_128()
    encoder = msgspec.msgpack.Encoder(order="sorted")

    def add(part: object) -> None:
        hasher.update(encoder.encode(part))

    add([state.fleet, state.sequence, state.time, state.commits, state.format, state.policy, state.parameters])
    # How deep a decoder gets into malformed bytes, and so which of these reasons it gives, depends on the interpreter.
    skipped = {reason: count for reason, count in state.skipped.items() if reason not in MALFORMED}
    malformed = sum(state.skipped.get(reason, 0) for reason in MALFORMED)
    add([skipped, malformed, state.ignored, list(state.writers.items()), list(state.removed.items())])
    for name, node in sorted(state.nodes.items()):
        # All fields: whether a default is left out depends on how a commit was written.
        add([name, astuple(node.registered), node.epoch, node.changed, node.lost, node.cordoned])
        index = state.caches.index(node.model)
        for tier, slot in sorted(node.slots.items()):
            if index.count(slot):
                add(tier)
                hasher.update(np.sort(np.frombuffer(index.packed(slot), "<u8")).tobytes())
        for group, layout in sorted(node.groups.layouts.items()) if node.groups is not None else ():
            add([group, *layout])
            hasher.update(np.sort(np.frombuffer(state.caches.groups.packed(node, group), "<u8")).tobytes())
    add([(key, session) for key, session in state.sessions.items()])
    load = state.load
    add([(request, active) for request, active in load.running.items()])
    add(list(load.early.items()))
    add([load.ratio, load.all_said, load.all_took, load.routed_recently, load.routed_half, load.half_began])
    for name in sorted(load.ordinal):
        prefills = load.prefills[load.ordinal[name]]
        add([name, load.of(name), prefills.since, list(prefills.waiting.items()), sorted(prefills.ends.items())])
    if load.contexts.kept:
        add(list(load.contexts.items()))
    if state.format >= ALLOWANCE_FORMAT:
        add(list(state.allowances.items()))
    if state.holding:
        queue, contexts = state.queue, load.contexts
        add([list(queue.items()), queue.let_in, queue.let_in_half, queue.half_began])
        add(list(contexts.talks.items()))
    for name, recency in sorted(state.recency.items()):
        add(name)
        hasher.update(pack_hashes(recency.order))
        add(sorted(recency.protected.items()))
    return hasher.hexdigest()
