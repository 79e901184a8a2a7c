"""Traffic to play with: what it leaves to be seen, that it is bounded, and that it ends with `kvplane up`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.services.demo.people import PEOPLE_A_NODE, TALKING_A_NODE, People
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.commands import run, up

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fleet import Fleet


@pytest.mark.anyio
async def test_people_talk_in_turns_that_find_their_conversation_cached(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a", decode_speed=1e4), NodeConfig(name="b", decode_speed=1e4))
    router = await fleet.router()
    client = await fleet.connect("people")
    people = People(client, fleet.name, "sim", nodes=2, block_size=16, pause=0.01)
    most = 0
    async with anyio.create_task_group() as group:
        group.start_soon(people.run)
        while people.traffic.totals.requests < 200:
            most = max(most, len(coordinator.state.load.running))
            await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    totals = people.traffic.totals
    # Of a turn all but the last question is known, of a first one its system prompt: some four fifths.
    assert totals.hit_rate > 0.5
    assert totals.failed == 0
    assert router.sessions["kept"] > router.sessions["new"] > 0
    assert router.sessions["new"] <= PEOPLE_A_NODE * 2
    assert 1 < most <= TALKING_A_NODE * 2 + 1


def test_up_with_traffic_has_something_to_show_and_ends(tmp_path: Path) -> None:
    with up(tmp_path, "--simulate", "2", "--traffic", "--http", "off") as (url, process):
        tail = [sys.executable, "-m", "kvplane", "events", "tail", "--json", "--from", "1", "--server", url]
        sessions: dict[str, str] = {}
        with subprocess.Popen(tail, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            for line in following.stdout:
                event = json.loads(line)
                if event["type"] == "RequestRouted.1":
                    sessions[event["request"]] = event["session"]
                elif event["type"] == "RequestCompleted.1" and event.get("cached_tokens", 0) > 0:
                    break
            following.terminate()
        assert sessions[event["request"]].startswith("person-")
        # The historian is a process of its own, and may still be starting.
        deadline = time.monotonic() + 30
        while (
            explained := run("explain", event["request"], "--server", url)
        ).returncode and time.monotonic() < deadline:
            pass
        assert explained.returncode == 0, explained.stderr
        assert "agrees" in explained.stdout
    assert process.returncode == 0


@pytest.mark.parametrize("options", [[], ["--simulate", "2", "--bare"]], ids=" ".join)
def test_traffic_needs_somebody_to_talk_to(options: list[str], tmp_path: Path) -> None:
    done = run("up", "--traffic", "--data", str(tmp_path / "data"), *options)
    assert done.returncode == 1
    assert "add --simulate" in done.stderr
    assert not (tmp_path / "data").exists()
