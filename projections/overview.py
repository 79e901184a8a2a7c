"""A fleet's state in numbers and rows, as commands and endpoints show it, and what differs between two moments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvplane.projections.digest import digest

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.groups import Membership
    from kvplane.projections.nodes import Node

LISTED = 1000
"""Most sessions and requests that are listed by name."""


def summary(state: FleetState, *, digests: bool) -> dict[str, Any]:
    """What the state holds, in numbers; with its digest, which takes time on large fleets."""
    return {
        "fleet": state.fleet,
        "sequence": state.sequence,
        **({"digest": digest(state)} if digests else {}),
        "commits": state.commits,
        "nodes": len(state.nodes),
        "available": sum(node.available for node in state.nodes.values()),
        "memberships": sum(index.block_copies for index in state.caches.by_model.values()),
        "sessions": len(state.sessions),
        "active": len(state.load.running),
        "format": state.format,
        "policy": state.policy,
        "parameters": state.parameters,
        "skipped": dict(state.skipped),
        "ignored": dict(state.ignored),
    }


def node_row(state: FleetState, node: Node) -> dict[str, Any]:
    """A node with its cache and load."""
    load = state.load.of(node.name)
    groups = {} if node.groups is None else {"groups": _groups(state, node, node.groups)}
    return {
        "node": node.name,
        "state": node.state,
        "reason": node.lost or "",
        "address": node.registered.address,
        "models": node.registered.models,
        "cache_mode": node.registered.cache_mode,
        "epoch": node.epoch,
        "block_size": node.registered.block_size,
        "held_blocks": {tier: state.caches.held(node, tier) for tier in node.slots},
        "capacity_blocks": node.registered.capacity_blocks,
        "active": load.active if load else 0,
        "max_active": node.registered.max_active,
        "sessions": state.sessions.on_node(node.name),
        **groups,
    }


def _groups(state: FleetState, node: Node, member: Membership) -> dict[int, dict[str, Any]]:
    """The further KV cache groups of a hybrid model."""
    return {
        number: {**layout._asdict(), "held_blocks": state.caches.groups.held(node, number)}
        for number, layout in sorted(member.layouts.items())
    }


def moment(state: FleetState, node: str = "") -> dict[str, Any]:
    """The fleet at a moment: numbers, digest and nodes; or one node, with its sessions and what runs there."""
    whole = {
        **summary(state, digests=True),
        "time": state.time,
        "rows": [node_row(state, known) for name, known in sorted(state.nodes.items()) if node in ("", name)],
    }
    if node:
        whole["running"] = [
            {"request": request, "tokens": active.tokens, "uncached": active.uncached, "since": active.time}
            for request, active in state.load.running.items()
            if active.node == node
        ][:LISTED]
        whole["on_node"] = [key[1] for key, session in state.sessions.items() if session.node == node][:LISTED]
    return whole


class Picture:
    """What a later moment is compared with: nodes, what each holds, and where sessions are."""

    def __init__(self, state: FleetState) -> None:
        self.overview = moment(state)
        self.held = {name: _held(state, node) for name, node in state.nodes.items()}
        self.sessions = {key: session.node for key, session in state.sessions.items()}


def _held(state: FleetState, node: Node) -> dict[str, set[int]]:
    index = state.caches.index(node.model)
    return {tier: set(index.held(slot)) for tier, slot in node.slots.items()}


def changes(before: Picture, after: Picture) -> dict[str, Any]:
    """What is otherwise at the second moment."""
    first = {row["node"]: row for row in before.overview["rows"]}
    second = {row["node"]: row for row in after.overview["rows"]}
    nodes = []
    for name in sorted({*first, *second}):
        one, other = first.get(name), second.get(name)
        held, holds = before.held.get(name, {}), after.held.get(name, {})
        blocks = {
            tier: {
                "came": len(holds.get(tier, set()) - held.get(tier, set())),
                "left": len(held.get(tier, set()) - holds.get(tier, set())),
                "stayed": len(held.get(tier, set()) & holds.get(tier, set())),
            }
            for tier in dict.fromkeys([*held, *holds])
        }
        fields = [*dict.fromkeys([*(one or {}), *(other or {})])]
        changed = {
            field: [one.get(field), other.get(field)]
            for field in fields
            if one is not None and other is not None and field != "held_blocks" and one.get(field) != other.get(field)
        }
        what = "joined" if one is None else "left" if other is None else "changed"
        if what != "changed" or changed or any(count["came"] or count["left"] for count in blocks.values()):
            nodes.append({"node": name, "what": what, "changed": changed, "blocks": blocks})
    both = before.sessions.keys() & after.sessions.keys()
    sessions = {
        "began": len(after.sessions.keys() - before.sessions.keys()),
        "ended": len(before.sessions.keys() - after.sessions.keys()),
        "moved": sum(before.sessions[key] != after.sessions[key] for key in both),
    }
    numbers = {
        key: [before.overview[key], after.overview[key]]
        for key in ("sequence", "time", "digest", "commits", "nodes", "available", "memberships", "sessions", "active",
                    "format", "policy", "parameters", "skipped", "ignored")
    }  # fmt: skip
    return {"numbers": numbers, "nodes": nodes, "sessions": sessions}
