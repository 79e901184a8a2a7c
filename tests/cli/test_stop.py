"""A simulation that is stopped: its processes go with it, without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import alive
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ENDLESS = """
def score(view, request, parameters):
    import os, pathlib, time
    pathlib.Path("writing").write_text(str(os.getpid()))
    pathlib.Path("writing").rename("worker")
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_processes_of_a_simulation_end_with_it(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "endless_for_test.py").write_text(ENDLESS)
    command = [
        sys.executable,
        "-m",
        "kvplane",
        "simulate",
        "agent",
        "--limit",
        "9",
        "--policy",
        "endless_for_test:score",
    ]
    # Whoever started the tests in the background may have had them ignore it, and processes would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(  # noqa: ASYNC220 - starting it does not wait
        command, stderr=subprocess.PIPE, start_new_session=True, env=found, cwd=tmp_path
    ) as process:
        try:
            await until(lambda: (tmp_path / "worker").exists() or process.poll() is not None, 20)
            worker = int((tmp_path / "worker").read_text())
            # A terminal's Ctrl-C goes to all of them.
            if ending == signal.SIGINT:
                os.killpg(process.pid, ending)
            else:
                process.send_signal(ending)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == (130 if ending == signal.SIGINT else -ending)
    assert b"Traceback" not in stderr
    await until(lambda: not alive(worker), 20)
