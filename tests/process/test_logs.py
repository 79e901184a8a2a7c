"""What is logged on others' behalf is bounded, and says how much was left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from kvplane.services.process import logs
from kvplane.services.process.logs import RATION_LINES, RATION_SECONDS, Rationed
from tests.support.waiting import until
from tests.support.with_credentials import NAME, guarded

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def test_one_event_gets_its_lines_and_no_more_until_time_has_passed() -> None:
    now = 100.0
    rationed = Rationed(lambda: now)

    def said(event: str, level: str = "warning") -> dict[str, Any] | None:
        try:
            return dict(rationed(None, level, {"event": event}))
        except structlog.DropEvent:
            return None

    for number in range(10 * RATION_LINES):
        assert (said("flood") is not None) is (number < RATION_LINES)
        assert said("debugged", "debug") is not None
    # Another event has lines of its own.
    assert said("other") == {"event": "other"}
    now += RATION_SECONDS
    assert said("flood") == {"event": "flood", "left_out": 9 * RATION_LINES}
    assert said("flood") == {"event": "flood"}
    now += RATION_SECONDS
    assert said("flood") == {"event": "flood"}


async def test_who_asks_without_a_right_reply_subject_writes_no_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with guarded(tmp_path) as fleet:
        router_of = await fleet.coordinator()
        router = await fleet.router()
        client = await fleet.stranger("client")
        capfd.readouterr()
        logs.configure("warning", "json")
        for _ in range(20 * RATION_LINES):
            await client.client.publish(f"kv.{NAME}.route", b"{}", reply="$JS.API." + "x" * 3000)
            await client.client.publish("$SRV.PING", b"")
        # What is asked behind it is answered behind it.
        await client.settle()
        await client.client.request(f"kv.{NAME}.route", b"{}", timeout=30)
        await until(lambda: router.tally.answers)
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        assert router_of.serving
    assert [line["event"] for line in lines] == ["request_dropped"] * RATION_LINES
    assert all(len(line["reply"]) <= 200 for line in lines)
