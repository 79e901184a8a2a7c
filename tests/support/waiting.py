"""Waiting for what happens elsewhere: the one way to do it."""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def until(holds: Callable[[], object | Awaitable[object]], seconds: float = 10, *, every: float = 0.01) -> None:
    """Wait until something holds, said by a function or a coroutine function. Raises `TimeoutError`."""
    with anyio.fail_after(seconds):
        while True:
            found = holds()
            if await found if isawaitable(found) else found:
                return
            await anyio.sleep(every)
