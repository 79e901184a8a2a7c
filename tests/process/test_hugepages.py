"""Services have their memory in huge pages from the start, unless someone decided otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events.log.stream import open_stream
from kvplane.services.rpc.client import instances

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COMMAND = [sys.executable, "-X", "utf8", "-m", "kvplane", "router", "--fleet", "huge", "--server"]


@pytest.fixture(autouse=True)
def _on_request() -> None:
    if not ENABLED.exists() or "[madvise]" not in ENABLED.read_text():
        pytest.skip("the kernel of this machine does not give huge pages to those who ask")
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        pytest.skip("the C library of this machine is not glibc 2.35 or newer")


@contextmanager
def _router(url: str, **environment: str) -> Iterator[int]:
    """A router in a process of its own, which is that of the command that was given; its id."""
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    with subprocess.Popen([*COMMAND, url], env={**clean, **environment}) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


async def _answers(client: Client) -> None:
    await open_stream(client.jetstream(), "huge", create=True)
    with anyio.fail_after(20):
        while not await instances(client, "kvplane-router", seconds=0.2):
            pass


def _tunables(process: int) -> set[str]:
    # As glibc has read them, a colon between two is a zero byte.
    environment = Path(f"/proc/{process}/environ").read_bytes().replace(b":", b"\0").split(b"\0")
    return {each.decode().removeprefix("GLIBC_TUNABLES=") for each in environment if b"glibc.malloc" in each}


def _huge_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


async def test_a_service_has_its_memory_in_huge_pages(server: Server, client: Client) -> None:
    with _router(server.url, GLIBC_TUNABLES="glibc.malloc.check=0") as process:
        await _answers(client)
        assert _tunables(process) == {"glibc.malloc.check=0", "glibc.malloc.hugetlb=1"}
        assert _huge_bytes(process) >= 8 << 20
        asked = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")[:-1]
        assert asked == [*COMMAND, server.url]


async def test_who_says_what_glibc_shall_do_is_obeyed(server: Server, client: Client) -> None:
    with _router(server.url, GLIBC_TUNABLES="glibc.malloc.hugetlb=0") as process:
        await _answers(client)
        assert _tunables(process) == {"glibc.malloc.hugetlb=0"}
