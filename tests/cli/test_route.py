"""`kvplane route`: a question that changes nothing, unless it is to be recorded; then it counts for a while."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.services.cli import app
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def routed(fleet: Fleet, *options: str) -> None:
    command = ["route", "sim", "--prompt", "Which of these nodes is mine?", "--server", fleet.url, *options]
    await anyio.to_thread.run_sync(partial(app, command, result_action="return_value"))


async def test_a_question_says_that_it_is_a_dry_run_and_which_request_it_was(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    router = await fleet.router()
    before = router.state.sequence
    await routed(fleet)
    out, err = capfd.readouterr()
    assert "a dry run: nothing was recorded" in err
    row = next(line.split() for line in out.splitlines() if line.startswith("request"))
    # The next commit is the one that is to be recorded: the question was none.
    await routed(fleet, "--record")
    out, err = capfd.readouterr()
    assert "recorded: it counts as load until it is completed, or for 60 s" in err
    recorded = next(line.split() for line in out.splitlines() if line.startswith("request"))
    await until(lambda: list(coordinator.state.load.running) == [recorded[1]])
    assert row[1] != recorded[1]
    assert coordinator.state.sequence == before + 1


async def test_what_is_recorded_and_never_sent_is_no_load_any_more_after_a_while(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    await fleet.router()
    await routed(fleet, "--record", "--lease-seconds", "0.3")
    assert "recorded: it counts as load until it is completed, or for 0.3 s" in capfd.readouterr().err
    await until(lambda: sum(coordinator.state.load.recent_requests))
    await until(lambda: not coordinator.state.load.running)
    load = coordinator.state.load.of("a")
    assert load is not None
    assert load.active == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "901", "nan"])
def test_a_lease_that_is_none_is_refused(seconds: str) -> None:
    with pytest.raises(BadRequest, match=f"--lease-seconds is {seconds}; it must be more than 0, and 900 at most"):
        app(["route", "sim", "--prompt", "Hello", "--lease-seconds", seconds], result_action="return_value")
