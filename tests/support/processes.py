"""What the system says of processes."""

from __future__ import annotations

import os
from pathlib import Path


def alive(process: int) -> bool:
    """Whether it runs, or could; a zombie does not."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def stopped(process: int) -> bool:
    """Whether SIGSTOP has reached all of a process; until then it may still answer."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def cpu_seconds(process: int) -> float:
    """Processor time that one has used."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def children(process: int | str = "self") -> set[int]:
    """Processes that one has started and not yet buried."""
    return {
        int(child) for each in Path(f"/proc/{process}/task").glob("*/children") for child in each.read_text().split()
    }
