"""Requests that wait for a place: all nodes of their model run as many as they may."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Iterable


class Places:
    """Who waits, by model, the first to come first."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[anyio.Event]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    async def wait(self, model: str) -> None:
        """Wait until a place of the model becomes free and nobody who came before waits for it."""
        free = anyio.Event()
        self._waiting.setdefault(model, deque()).append(free)
        try:
            await free.wait()
        finally:
            # Who leaves before, leaves the queue.
            waiting = self._waiting.get(model, deque())
            if free in waiting:
                waiting.remove(free)
                if not waiting:
                    del self._waiting[model]

    def free(self, models: Iterable[str]) -> None:
        """A place of a node that serves these models is free: one request of each may try."""
        for model in models:
            waiting = self._waiting.get(model)
            if waiting:
                waiting.popleft().set()
                if not waiting:
                    del self._waiting[model]
