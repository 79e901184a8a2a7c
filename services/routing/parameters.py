"""What can be set about a policy."""

from __future__ import annotations

import math
from typing import NamedTuple


class Parameter(NamedTuple):
    """One parameter of a policy."""

    default: float
    unit: str
    meaning: str
    least: float = 0.0
    most: float = math.inf
