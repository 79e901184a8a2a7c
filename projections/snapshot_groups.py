"""The further KV cache groups of hybrid models in a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.projections.groups import Layout, Membership, ModelGroups
from kvplane.projections.prefix import PrefixIndex
from kvplane.projections.snapshot_segments import MOST_SLOTS, Part, SegmentPart, broken, segments, segments_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.projections.fleet import FleetState


class GroupsPart(Part):
    """Further KV cache groups of the nodes of a model: those nodes by their slots, their layouts, each group's index."""

    model: str
    owners: list[str | None]
    layouts: dict[str, dict[int, Layout]]
    segments: dict[int, list[SegmentPart]]


def groups_of(state: FleetState) -> list[GroupsPart]:
    """The groups of a state."""
    layouts = {node.name: node.groups.layouts for node in state.nodes.values() if node.groups is not None}
    return [
        GroupsPart(
            model, of.owners, {name: layouts[name] for name in of.owners if name is not None},
            {group: segments_of(index) for group, index in of.indexes.items()},
        )
        for model, of in state.caches.groups.by_model.items()
    ]  # fmt: skip


def put_groups(state: FleetState, parts: Sequence[GroupsPart]) -> None:
    """Give a state that has its nodes these groups. Raises `ValueError`, or what Python raises, where they can't be."""
    if sum(len(part.owners) for part in parts) > MOST_SLOTS:
        broken("there are more slots than there can be")
    for part in parts:
        of = ModelGroups()
        of.owners = part.owners
        if part.model in state.caches.groups.by_model or not any(part.owners):
            broken("a model's groups are there twice, or of no node")
        for slot, name in enumerate(part.owners):
            if name is None:
                continue
            node = state.nodes[name]
            layouts = part.layouts[name]
            if node.groups is not None or node.model != part.model or not layouts.keys() <= part.segments.keys():
                broken("a node has groups twice, or some that are not there")
            if any(layout.span < 1 or layout.window < 0 for layout in layouts.values()):
                broken("a group can't be laid out so")
            node.groups = Membership(slot)
            node.groups.tell(layouts)
        for group, parts_of in part.segments.items():
            having = [name if name is not None and group in part.layouts[name] else None for name in part.owners]
            index = of.indexes[group] = PrefixIndex()
            index.add_slot(len(having) - 1)
            index.adopt(segments(parts_of, having))
        state.caches.groups.by_model[part.model] = of
