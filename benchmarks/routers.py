"""Other projects' gateways in front of the same engine: processes of programs that are on `PATH`, or in `KVPLANE_ROUTERS`.

`pip install sglang-router==0.3.2 smg vllm-router` in an environment of its own, and `KVPLANE_ROUTERS=that/bin`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.common import pin
from kvplane.services.embedded.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_SECONDS = 60
COMMANDS = {
    "vllm-router cache_aware": ("vllm-router", "--policy", "cache_aware"),
    "vllm-router round_robin": ("vllm-router", "--policy", "round_robin"),
    "sglang-router cache_aware": ("sglang-router", "launch", "--policy", "cache_aware"),
    "smg cache_aware": ("smg", "launch", "--policy", "cache_aware"),
}


def found() -> dict[str, list[str]]:
    """Commands of those that are installed."""
    place = os.environ.get("KVPLANE_ROUTERS")
    paths = {name: shutil.which(words[0], path=place) for name, words in COMMANDS.items()}
    return {name: [path, *COMMANDS[name][1:]] for name, path in paths.items() if path}


@contextmanager
def running(command: list[str], engines: list[str]) -> Iterator[dict[str, int]]:
    """One of them on core 0: its port and process."""
    port = free_port()
    whole = [
        *command, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", *engines,
    ]  # fmt: skip
    # It has the core of whoever starts it, with all of its threads.
    pin(0)
    process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pin(1)
    try:
        until = time.monotonic() + READY_SECONDS
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not begin")
            time.sleep(0.2)
        yield {"port": port, "pid": process.pid}
    finally:
        process.kill()
        process.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
