"""The log's time when the servers' clocks are wrong: it goes on, and what was wrong leaves nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.services.process import logs
from kvplane.services.replication.replica import Replica
from tests.support.fold_given import SECOND, START, Given, two_nodes

if TYPE_CHECKING:
    from nats.aio.client import Client


@pytest.fixture
def two() -> Given:
    return two_nodes()


def test_a_clock_that_goes_back_a_little_is_not_followed(two: Given) -> None:
    two.routes("q", "a", 1)
    two.routes("r", "a", 1, after=-60)
    assert two.state.time == START + 5 * SECOND
    assert {run.time for run in two.state.load.running.values()} == {two.state.time}


def test_a_clock_that_was_a_year_ahead_leaves_nothing_behind(two: Given) -> None:
    """Else the node would have a year of prefill before it, and no request would ever be over."""
    year = 365 * 86400
    two.routes("old", "a", 1, tokens=1000)
    two.routes("ahead", "a", 2, tokens=1000, after=year)
    assert list(two.state.load.running) == ["ahead"]
    two.routes("right", "a", 3, tokens=1000, after=1 - year)
    now = two.now / SECOND
    assert two.state.time == two.now
    assert [run.time for run in two.state.load.running.values()] == [two.now, two.now]
    load = two.state.load.of("a")
    assert load is not None
    assert 1.5 < load.prefill_done - now < 2.5
    two.routes("later", "b", 9, after=901)
    assert list(two.state.load.running) == ["later"]


@pytest.mark.anyio
async def test_a_replica_says_that_a_clock_was_ahead_and_by_how_much(client: Client) -> None:
    watching = Replica(client, "f")
    logs.configure("warning")
    given = Given()
    for after in (1, 86_400, 1 - 86_400):
        given.raw("kv.f.control", codec.encode([types.PolicyChanged("ttft")]), after=after)
    with capture_logs() as logged:
        for message in given.messages:
            watching._handle(message)
    assert [(entry["event"], entry["sequence"], entry["seconds"]) for entry in logged] == [
        ("log_time_set_back", 3, 86_399.0)
    ]
    assert watching.state.set_back == 1
