"""`wrk`, as many use it, on a gateway: every answer is whole, and each is on the log once."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.gateways import on_simulated

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fleet import Fleet

SCRIPT = """
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
local count = 0
function request()
  count = count + 1
  local body = string.format(
    '{"model": "sim", "prompt": [%%d, 2, 3, 4, 5, 6, 7, 8], "max_tokens": 2, "stream": %s}', count
  )
  return wrk.format(nil, "/v1/completions", nil, body)
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("made %%d wrong %%d\\n", summary.requests, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@pytest.mark.parametrize("stream", [False, True])
async def test_a_load_by_wrk(fleet: Fleet, tmp_path: Path, *, stream: bool) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not on this machine")
    script = tmp_path / "completions.lua"
    script.write_text(SCRIPT % str(stream).lower())
    async with on_simulated(fleet) as scene:
        command = ["wrk", "-t2", "-c32", "-d1s", "--timeout", "30s", "-s", str(script), scene.url]
        done = await anyio.run_process(command, check=False)
        told = re.search(r"made (\d+) wrong (\d+)", done.stdout.decode())
        assert told is not None, done
        made, wrong = int(told[1]), int(told[2])
        assert (made > 32, wrong) == (True, 0), done.stdout.decode()
        await scene.idle()
        routed, completed = await scene.recorded()
    statuses = Counter(event.status for event in completed)
    # Those that were on their way when the time was over have been left.
    assert made <= statuses["ok"] <= len(routed) <= made + 32
    assert statuses.total() == len(routed) == len({event.request for event in routed})
    assert set(statuses) <= {"ok", "cancelled"}
