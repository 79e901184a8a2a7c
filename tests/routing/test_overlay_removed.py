"""What a node says is gone is promised no more, unless a prompt that waits there will bring it back."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.events import types
from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import PREDICTION_SECONDS, Overlay
from kvplane.services.routing.query import Query
from tests.support.fold_given import SECOND, Given, registered
from tests.support.routed_requests import CHAIN, routed

if TYPE_CHECKING:
    from kvplane.projections.skips import Applied


class Routed(Given):
    """A log that a router reads, with its overlay, and two reported nodes."""

    def __init__(self, overlay: Overlay | None = None) -> None:
        super().__init__()
        self.overlay = overlay or Overlay()
        self.chooser = Chooser(self.state, self.overlay)
        for name in "ab":
            self.node(registered(name, capacity=64))

    def raw(self, where: str, body: bytes, headers: dict[str, str] | None = None, *, after: float = 1) -> Applied:
        applied = super().raw(where, body, headers, after=after)
        if applied.commit is not None:
            self.overlay.observe(applied.commit, self.now, self.state, "w", self.now)
        return applied

    def sends(self, node: str, length: int = 8) -> None:
        """A request that no node is known to have anything of goes to a node."""
        event = routed(f"q{len(self.messages)}", node, length=length)
        self.overlay.decided(event, self.state.load.ordinal[node], 16, self.now, predict="m")

    def sends_on(self, node: str, length: int = 8) -> str:
        """The same, and the decision is on the log: the node has still to compute it."""
        event = routed(f"q{len(self.messages)}", node, length=length)
        self.overlay.decided(event, self.state.load.ordinal[node], 16, self.now, predict="m")
        assert self.put("access", "w", event, after=0) is None
        return event.request

    def awaited(self, node: str) -> set[int]:
        """Blocks of the prompts that the fold takes as not computed yet."""
        load = self.state.load
        waiting = load.prefills[load.ordinal[node]].waiting
        return {block for request in waiting for block in unpack_hashes(load.running[request].hashes)}

    def promised(self, node: str) -> int:
        """Leading blocks of the chain that a decision would count on."""
        query = Query("q", "m", pack_hashes(CHAIN), 8 * 16 + 1, 8, 16)
        roster = self.chooser.roster("m")
        match, _ = self.chooser.matches(roster, query)
        return int(match[roster.position[node]])

    def wait(self, periods: int) -> None:
        """Time passes for the router."""
        self.now += int(periods * PREDICTION_SECONDS) * SECOND
        self.overlay.expire(self.now)


def test_what_was_predicted_stored_and_evicted_again_is_not_promised() -> None:
    given_ = Routed()
    given_.sends("a")
    assert given_.promised("a") == 8
    given_.stores("a", *CHAIN)
    assert given_.promised("a") == 8
    given_.drops("a", 8, 7, 6)
    assert given_.promised("a") == given_.matches("a", *CHAIN) == 5
    given_.drops("a", *CHAIN[:5])
    assert given_.promised("a") == 0


def test_what_is_stored_ends_no_prediction_of_what_is_still_computed() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.stores("a", 1, 2, 3)
    assert given_.promised("a") == 8


def test_a_block_that_leaves_from_the_middle_cuts_the_promise_there() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.stores("a", *CHAIN)
    given_.drops("a", 4)
    assert given_.promised("a") == 3
    given_.stores("a", 4)
    assert given_.promised("a") == 8


def test_a_removal_of_what_was_not_predicted_ends_nothing() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.stores("a", 91, 92)
    given_.drops("a", 91, 92)
    given_.stores("b", *CHAIN)
    given_.drops("b", *CHAIN)
    assert (given_.promised("a"), given_.promised("b")) == (8, 0)


def test_what_is_predicted_after_a_removal_stands() -> None:
    given_ = Routed()
    given_.stores("a", *CHAIN)
    given_.sends("a")
    given_.drops("a", *CHAIN)
    given_.sends("a", 6)
    assert given_.promised("a") == 6


def test_a_removal_that_comes_after_a_newer_prediction_ends_it_until_the_node_stores_the_blocks() -> None:
    """It is not known whether the node evicted before or after it ran the request: too little is promised, not too much."""
    given_ = Routed()
    given_.stores("a", *CHAIN[:4])
    given_.sends("a")
    given_.drops("a", 4)
    assert given_.promised("a") == 3
    given_.stores("a", *CHAIN)
    assert given_.promised("a") == 8


@pytest.mark.parametrize("scanned", [0, 8])
def test_what_a_prompt_that_waits_there_needs_is_still_to_be_expected(scanned: int) -> None:
    """Whether few blocks are gone or many, which are looked for in different ways."""
    given_ = Routed(Overlay(scanned_blocks=scanned))
    given_.stores("a", *CHAIN)
    request = given_.sends_on("a", 6)
    given_.drops("a", 8, 7, 6, 5)
    assert (given_.promised("a"), given_.matches("a", *CHAIN)) == (6, 4)
    given_.completes(request, "a")
    given_.drops("a", 4)
    assert given_.promised("a") == 3


def test_a_removal_ends_the_predictions_of_both_generations() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.wait(1)
    given_.sends("a", 6)
    given_.drops("a", 5)
    assert given_.promised("a") == 4
    given_.wait(1)
    given_.sends("b", 1)
    given_.drops("b", 1)
    assert (given_.promised("a"), given_.promised("b")) == (4, 0)


def test_of_a_prediction_that_is_old_already_what_was_removed_is_gone() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.wait(1)
    given_.drops("a", 3)
    assert given_.promised("a") == 2


def test_what_an_older_life_of_the_node_says_ends_no_prediction() -> None:
    given_ = Routed()
    before = given_.state.nodes["a"].epoch
    given_.node(registered("a", capacity=64))
    given_.sends("a")
    removed = types.BlocksRemoved("a", before, 1, pack_hashes(CHAIN))
    assert given_.put("cache", "a", removed) == "stale_epoch"
    assert given_.promised("a") == 8


def test_a_block_that_stays_in_another_tier_is_still_to_be_expected() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.stores("a", *CHAIN[:4])
    given_.stores("a", *CHAIN[:4], tier="cpu")
    given_.drops("a", 2)
    given_.drops("a", 3, tier="cpu")
    assert given_.promised("a") == 8
    given_.drops("a", 3)
    assert given_.promised("a") == 2


def test_a_block_that_comes_back_in_the_same_commit_is_still_to_be_expected() -> None:
    given_ = Routed()
    given_.sends("a")
    given_.stores("a", *CHAIN[:4])
    life = given_.state.nodes["a"].epoch
    third = pack_hashes([3])
    gone, back = types.BlocksRemoved("a", life, 2, third), types.BlocksStored("a", life, 3, third)
    given_.put("cache", "a", gone, back)
    assert given_.promised("a") == 8
    given_.put("cache", "a", back, gone)
    assert given_.promised("a") == 2


def test_after_a_clear_nothing_is_promised_that_the_fold_does_not_have() -> None:
    given_ = Routed()
    given_.sends("a")
    life = given_.state.nodes["a"].epoch
    cleared, stored = types.CacheCleared("a", life, 1), types.BlocksStored("a", life, 2, pack_hashes([1, 2, 3]))
    given_.put("cache", "a", cleared, stored)
    assert given_.promised("a") == 3


blocks_of_chain = st.lists(st.sampled_from(CHAIN[:5]), min_size=1, max_size=5, unique=True)
reports = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "remove"]), st.sampled_from(["gpu", "gpu", "cpu"]), blocks_of_chain),
    min_size=1, max_size=3,
)  # fmt: skip
steps = st.lists(
    st.tuples(
        st.sampled_from(["send", "route", "complete", "report", "report", "report", "clear", "register", "period"]),
        st.sampled_from("ab"), st.integers(1, 5), reports,
    ),
    max_size=30,
)  # fmt: skip


class Naive:
    """The overlay's predictions and what the nodes hold, a second time: sets of blocks."""

    def __init__(self) -> None:
        self.young: dict[str, set[int]] = {"a": set(), "b": set()}
        self.old: dict[str, set[int]] = {"a": set(), "b": set()}
        self.held: dict[tuple[str, str], set[int]] = defaultdict(set)

    def reported(self, node: str, changes: list[tuple[str, Any, list[int]]], awaited: set[int]) -> None:
        removed: set[int] = set()
        for what, tier, blocks in changes:
            if what == "store":
                self.held[node, tier] |= set(blocks)
            else:
                self.held[node, tier] -= set(blocks)
                removed |= set(blocks)
        gone = removed - self.held[node, "gpu"] - self.held[node, "cpu"] - awaited
        self.young[node] -= gone
        self.old[node] -= gone

    def clear(self, node: str) -> None:
        for blocks in (self.held[node, "gpu"], self.held[node, "cpu"], self.young[node], self.old[node]):
            blocks.clear()

    def promised(self, node: str) -> int:
        known = [predicted for predicted in (self.young, self.old) if any(1 in each for each in predicted.values())]
        held = self.held[node, "gpu"] | self.held[node, "cpu"]
        return max(leading(held), leading(known[0][node]) if known else 0)


def leading(blocks: set[int]) -> int:
    return next((at for at, block in enumerate(CHAIN) if block not in blocks), len(CHAIN))


@given(steps)
def test_a_promise_is_what_is_held_or_predicted_and_not_gone(script: list[tuple[str, str, int, list[Any]]]) -> None:
    given_, naive = Routed(), Naive()
    # Commits take no time here, so that periods pass only in a step of their own.
    for what, node, length, changes in script:
        life = given_.state.nodes[node].epoch
        if what == "send":
            given_.sends(node, length)
            naive.young[node] |= set(CHAIN[:length])
        elif what == "route":
            given_.sends_on(node, length)
            naive.young[node] |= set(CHAIN[:length])
        elif what == "complete":
            for request in [key for key, active in given_.state.load.running.items() if active.node == node]:
                assert given_.put("access", "w", types.RequestCompleted(request, node), after=0) is None
        elif what == "report":
            events = [
                types.BlocksStored(node, life, 1, pack_hashes(blocks), None, tier)
                if kind == "store"
                else types.BlocksRemoved(node, life, 1, pack_hashes(blocks), tier)
                for kind, tier, blocks in changes
            ]
            assert given_.put("cache", node, *events, after=0) is None
            naive.reported(node, changes, given_.awaited(node))
        elif what == "clear":
            assert given_.put("cache", node, types.CacheCleared(node, life, 1), after=0) is None
            naive.clear(node)
        elif what == "register":
            assert given_.put("node", node, registered(node, capacity=64), after=0) is None
            naive.clear(node)
        else:
            given_.wait(1)
            naive.old, naive.young = naive.young, {"a": set(), "b": set()}
        assert {name: given_.promised(name) for name in "ab"} == {name: naive.promised(name) for name in "ab"}
