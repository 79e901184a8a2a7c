"""Whatever is written, the memory of a fold is bounded; and the page about limits says what the code does."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections import fleet, load, snapshot, snapshot_body
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from tests.support.fold_given import Given, registered, replayed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "limits.md"


def test_each_tier_of_a_commit_must_have_room() -> None:
    given = Given()
    given.node(registered("a"))
    epoch = given.state.nodes["a"].epoch
    tiers: list[types.Tier] = ["gpu", "cpu", "gpu"]
    # The CPU's tier has room for 64 blocks, and more than twice that is a flood.
    assert given.stores("a", *range(1000, 1129), tier="cpu") is None
    mixed = [types.BlocksStored("a", epoch, 2, pack_hashes([at]), None, tier) for at, tier in enumerate(tiers)]
    assert given.put("cache", "a", *mixed) == "capacity"
    assert given.held("a") == set()
    assert given.put("cache", "a", mixed[0], mixed[2]) is None
    assert given.held("a") == {0, 2}


def test_a_node_that_floods_is_stopped_at_twice_its_capacity_and_goes_on_when_it_is_cleared() -> None:
    given = Given()
    given.node(registered("a", capacity=8))
    given.node(registered("b", capacity=8))
    refusals = [given.stores("a", *range(n, n + 4)) for n in range(1, 401, 4)]
    assert refusals == [None] * 5 + ["capacity"] * 95
    assert len(given.held("a")) == 20
    assert given.stores("b", 1, 2) is None
    given.drops("a", *range(1, 13))
    assert given.stores("a", 1000) is None
    assert given.held("a") == {*range(13, 21), 1000}


def test_a_tier_that_was_not_registered_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "TIER_LIMIT", 5)
    given = Given()
    given.node(registered("a", capacity=100))
    assert [given.stores("a", n, n + 1, tier="disk") for n in (1, 3, 5, 7)] == [None, None, None, "capacity"]
    assert [given.stores("a", n, n + 1) for n in (1, 3, 5, 7)] == [None, None, None, "capacity"]


def test_there_are_not_more_nodes_than_a_fleet_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "NODES_LIMIT", 2)
    given = Given()
    given.node(registered("a"))
    given.node(registered("b"))
    assert given.put("node", "c", registered("c")) == "too_many_nodes"
    assert given.put("node", "b", registered("b")) is None
    assert set(given.state.nodes) == {"a", "b"}


def test_the_oldest_of_too_many_requests_are_taken_as_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RUNNING_LIMIT", 3)
    given = Given()
    given.node(registered("a"))
    for number in range(6):
        given.routes(f"q{number}", "a", number)
    given.stores("a", 9)
    assert list(given.state.load.running) == ["q3", "q4", "q5"]
    assert given.state.load.active[given.state.load.ordinal["a"]] == 3
    assert digest(given.state) == digest(replayed(given.messages))


def test_subjects_that_nobody_registered_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "HEADS_LIMIT", 3)
    given = Given()
    given.node(registered("a"))
    assert given.state.head("kv.f.node.never") == 0
    for number in range(5):
        given.raw(f"kv.f.node.junk{number}", b"junk")
    assert list(given.state.heads.values()) == [4, 5, 6]
    assert (given.state.head("kv.f.node.junk4"), given.state.head("kv.f.node.a")) == (6, None)


def test_a_node_that_registers_again_and_again_with_other_models_leaves_nothing() -> None:
    """Beyond `MOST_SLOTS` slots there would be no snapshot any more, and so no compaction."""
    given = Given()
    given.node(registered("a", models=["kept"]))
    given.node(registered("b", models=["kept"]))
    for number in range(300):
        given.node(registered("b", models=[f"m{number}"]))
        given.stores("b", 1, 2, number)
    caches = given.state.caches
    assert set(caches.by_model) == {"kept", "m299"}
    assert given.put("node", "b", types.NodeRemoved("b")) is None
    assert set(caches.by_model) == {"kept"}
    assert sum(len(caches.owners(model)) for model in caches.by_model) == 2
    assert digest(given.state) == digest(replayed(given.messages))
    again = snapshot.load("f", snapshot.dump(given.state), verify=True)
    assert set(again.caches.by_model) == {"kept"}


def test_a_snapshot_of_one_that_kept_empty_indexes_is_read_without_them() -> None:
    given = Given()
    given.node(registered("a"))
    body = snapshot_body.take(given.state)
    body.indexes.append(snapshot_body.IndexPart("gone", 2, []))
    state = FleetState("f")
    snapshot_body.put(state, body)
    assert set(state.caches.by_model) == {"m"}


ROWS = re.findall(r"^\| .*\| `([a-z_.]+)\.([A-Z_]+)` \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("module", "name", "value"), ROWS, ids=[name for _, name, _ in ROWS])
def test_the_page_says_what_the_code_does(module: str, name: str, value: str) -> None:
    assert float(value.strip().replace(",", "")) == getattr(importlib.import_module(f"kvplane.{module}"), name)


def test_no_limit_of_the_folds_or_the_log_is_missing_on_the_page() -> None:
    listed = {(module, name) for module, name, _ in ROWS}
    for folder in ("events", "projections"):
        root = PAGE.parents[1]
        for file in (root / folder).rglob("*.py"):
            module = ".".join(file.relative_to(root).with_suffix("").parts)
            for name in re.findall(r"^([A-Z][A-Z_]*_LIMIT|LIMIT_[A-Z_]+)\b", file.read_text(), re.MULTILINE):
                value = getattr(importlib.import_module(f"kvplane.{module}"), name)
                assert any(
                    name == known and value == getattr(importlib.import_module(f"kvplane.{at}"), known)
                    for at, known in listed
                ), name
