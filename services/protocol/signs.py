"""Signs of life: how one who asks for what takes minutes learns that the service which works on it has died.

A request with the header `WANTED` gets empty messages with the header `SIGN` until its answer comes, the first one at once. A
service that is older knows neither, and sends only the answer.
"""

from __future__ import annotations

WANTED = "Kv-Signs-Wanted"
SIGN = "Kv-Sign"
SIGN_SECONDS = 2.0
"""Time between two signs."""
SILENT_SECONDS = 15.0
"""A service that gave signs and gives none for so long is gone."""
