"""The command `copies`."""

from __future__ import annotations

from kvplane.events.log.copies import set_copies
from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.protocol.errors import BadRequest

WAIT_SECONDS = 120.0


def copies(count: int, /, *, common: Common = COMMON) -> None:
    """Have so many servers of the cluster keep the log and its snapshots; both stay in use meanwhile.

    Parameters
    ----------
    count
        1, 3 or 5. With 3, any one server may be lost.
    """
    start(common, quiet=True)
    if count not in {1, 3, 5}:
        raise BadRequest(f"copies are {count}; 1, 3 or 5 can be kept")
    done = run_async(_set, count, common)
    state = "all are current" if done else "some are not current yet; `kvplane doctor` says which"
    show.say(f"{count} of the log and of its snapshots; {state}")


async def _set(count: int, common: Common) -> bool:
    async with common.connected("kvplane-copies", seconds=CONNECT_SECONDS) as client:
        return await set_copies(client, common.fleet, count, seconds=WAIT_SECONDS)
