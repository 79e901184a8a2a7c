"""Where modules are looked for that users name."""

from __future__ import annotations

import sys


def look_here() -> None:
    """Let modules of the current folder be imported, as `python -m` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")
