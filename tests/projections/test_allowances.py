"""What one node may write: the fold against a naive bucket, and that nothing of what goes beyond is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st

from kvplane.events import allowance, types
from kvplane.events.allowance import BLOCKS_A_SECOND, BLOCKS_AT_ONCE, COMMIT_BLOCKS, EVENT_BLOCKS
from kvplane.events.hashing import pack_hashes
from kvplane.events.subjects import access_name, subject
from kvplane.projections.digest import digest
from kvplane.projections.snapshot import dump, load
from tests.support.fold_given import Given, registered, replayed

if TYPE_CHECKING:
    from kvplane.events.subjects import Topic

SECOND = 10**9
LARGE = 100_000
DONE = types.RequestCompleted("r", "a", "ok", 1, 0, 1, 0.1, 0.1)


def fleet(in_force: int = allowance.ALLOWANCE_FORMAT) -> Given:
    """Two nodes with room for more than they may write at once."""
    given = Given()
    assert given.put("control", "", types.FormatRaised(in_force)) is None
    for name in ("a", "b"):
        given.node(registered(name, capacity=100 * LARGE))
    return given


def stores(given: Given, node: str, first: int, count: int = LARGE, after: float = 0) -> str | None:
    """A node stores blocks that it has not stored before; why that is skipped."""
    event = types.BlocksStored(node, given.state.nodes[node].epoch, first, pack_hashes(range(first, first + count)))
    return given.put("cache", node, event, after=after)


def test_a_node_that_writes_without_end_is_held_and_nobody_else_is() -> None:
    given = fleet()
    assert [stores(given, "a", at * LARGE + 1) for at in range(5)] == [None, None, None, "too_fast", "too_fast"]
    assert stores(given, "b", 1, 3) is None
    assert given.state.caches.held(given.state.nodes["a"], "gpu") == 3 * LARGE


def test_it_goes_on_when_so_much_time_has_passed() -> None:
    given = fleet()
    for at in range(3):
        assert stores(given, "a", at * LARGE + 1) is None
    beyond = 3 * (LARGE + COMMIT_BLOCKS + EVENT_BLOCKS) - BLOCKS_AT_ONCE
    assert stores(given, "a", 1, 1, after=(beyond - 100) / BLOCKS_A_SECOND) == "too_fast"
    assert stores(given, "a", 1, 1, after=200 / BLOCKS_A_SECOND) is None


def test_earlier_logs_know_nothing_of_it() -> None:
    given = fleet(allowance.ALLOWANCE_FORMAT - 1)
    assert {stores(given, "a", at * LARGE + 1) for at in range(8)} == {None}


@pytest.mark.parametrize("name", ["a", "a" * 120])
def test_what_cannot_be_read_counts_as_well(name: str) -> None:
    given = fleet()
    where = subject("f", "access", access_name(name))
    reasons = [given.raw(where, b"\xc1", after=0).skipped for _ in range(BLOCKS_AT_ONCE // COMMIT_BLOCKS + 2)]
    assert set(reasons[:-1]) == {"undecodable"}
    assert reasons[-1] == "too_fast"


def test_routers_are_not_held() -> None:
    given = fleet()
    writing = [
        given.put("access", name, *[DONE] * 12_000, after=0) for name in ["router-1"] * 5 + [access_name("a")] * 5
    ]
    assert writing == [None] * 8 + ["too_fast"] * 2


def test_a_clock_that_is_set_right_holds_nobody_for_an_hour() -> None:
    given = fleet()
    assert stores(given, "a", 1, after=3600) is None
    assert stores(given, "a", LARGE + 1, after=-3600) is None
    assert stores(given, "a", 2 * LARGE + 1) is None
    assert stores(given, "a", 3 * LARGE + 1) == "too_fast"
    assert stores(given, "a", 3 * LARGE + 1, after=1) is None


writing = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "access"]), st.integers(0, LARGE), st.sampled_from([0, 0, 0, 0.3, 2]), st.booleans()
    ),
    max_size=16,
)


@settings(max_examples=40, deadline=None)
@over(writes=writing)
def test_it_is_a_bucket_of_so_many_blocks(
    writes: list[tuple[Literal["a", "b", "access"], int, float, bool]],
) -> None:
    given = fleet()
    levels: dict[str, tuple[int, int]] = {}
    a_block = SECOND // BLOCKS_A_SECOND
    for where, count, after, again in writes:
        topic: Topic = "access" if where == "access" else "cache"
        if topic == "cache":
            reason = stores(given, where, 1, count, after=after)
            blocks = EVENT_BLOCKS + count
        else:
            events = 1 + count // 10
            reason = given.put("access", access_name("a"), *[DONE] * events, after=after)
            blocks = EVENT_BLOCKS * events
        level, since = levels.get(where, (4 * SECOND, given.now))
        level = min(4 * SECOND, level + given.now - since)
        assert (reason == "too_fast") == (level < 0)
        levels[where] = (level if reason == "too_fast" else level - (COMMIT_BLOCKS + blocks) * a_block), given.now
        if again:
            given.state = load("f", dump(given.state, known_digest=""))
    assert digest(given.state) == digest(replayed(given.messages))


def test_a_writer_with_a_pace_is_never_held() -> None:
    """Full reports of a large node, one life after the other, by adapters that know nothing of each other."""
    given = fleet()
    now, number = 0.0, 0
    for _ in range(5):
        pace = allowance.Pace(now)
        for _ in range(40):
            wait = max(0.0, pace.wait(now))
            now += wait
            number += 1
            assert stores(given, "a", number * 20_000, 20_000, after=wait) is None
            pace.wrote(20_000 + EVENT_BLOCKS, now)
        given.put("cache", "a", types.CacheCleared("a", given.state.nodes["a"].epoch, 1), after=0)


def test_a_commit_counts_what_its_events_count_in_whatever_company() -> None:
    hashes = pack_hashes(range(1, 41))
    events = [
        types.BlocksStored("a", 1, 1, hashes), types.BlocksRemoved("a", 1, 1, hashes), types.CacheCleared("a", 1, 1), DONE,
        types.BlocksPlaced("a", 1, hashes, hashes), types.RequestRouted("q", "m", "a", 0, 40, 640, hashes),
        types.RequestHeld("q", "m", 640, hashes=hashes, blocks=40),
    ]  # fmt: skip
    full = SECOND // BLOCKS_A_SECOND
    assert [allowance.cost(event) - EVENT_BLOCKS for event in events] == [40, 40, 0, 0, 80, 40, 40]
    for commit in (events, *([event] for event in events)):
        assert allowance.after(0, 0, commit) == (COMMIT_BLOCKS + sum(map(allowance.cost, commit))) * full
