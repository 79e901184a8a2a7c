"""Versions of the log's format, so that a fleet can be upgraded while it runs.

A log is in one format at a time: 1, until a `FormatRaised` on it says otherwise. Every replica, of whatever version of
kvplane, reads it alike:

- events that came with a later format than the one in force are skipped, by those who know them as by those who don't;
- who meets a `FormatRaised` beyond its own `FORMAT` stops, and says which kvplane is needed, instead of guessing;
- who knows a later shape of an event still reads the former ones: they are brought up to today's shape as they are decoded.

So new replicas start beside old ones, the old ones leave, and then the format is raised. A new field with a default needs
none of this as long as the fold does not read it. To give an event a new shape: the former class moves here with its tag,
today's gets the next number, `FORMER` leads from one to the other, `SINCE` says the format of the new one, `FORMAT` is one
more, and writers go on writing the former while it is in force. A change of what the fold makes of the same events is a new
format, too: the fold asks `FleetState.format`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvplane.events import types
from kvplane.events.errors import BadCommit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvplane.events.subjects import Topic

FORMAT = 5
"""The newest format that this kvplane reads and writes. 2: no node's word alone moves the fleet's pace (`projections.load`).
3: the contexts of live conversations are counted (`projections.contexts`). 4: what one node writes in a second is bounded
(`events.allowance`), and requests can be held (`projections.held`). 5: what the further KV cache groups of hybrid models hold
is on the log, and no more is a hit than they can serve (`projections.groups`)."""

SINCE: dict[type[types.Event], int] = {
    types.RequestHeld: 4,
    types.RequestReleased: 4,
    types.GroupStored: 5,
    types.GroupRemoved: 5,
}
"""In which format an event got this shape; 1 for those that are not here."""

FORMER: dict[Topic, dict[type[types.Event], Callable[[Any], types.Event]]] = {}
"""Former shapes of the events of a topic, each with what makes the next one of it."""


def brought_up(topic: Topic, events: Sequence[types.Event]) -> Sequence[types.Event]:
    """The events in today's shapes."""
    former = FORMER.get(topic)
    if not former:
        return events
    current = []
    for event in events:
        while (upcast := former.get(type(event))) is not None:
            event = upcast(event)  # noqa: PLW2901 - one version after the other
        current.append(event)
    return current


def check_format(events: Sequence[types.Event], in_force: int) -> None:
    """Raise `BadCommit`, as a reader that doesn't know them would, for events of a later format than the one in force."""
    for event in events:
        since = SINCE.get(type(event), 1)
        if since > in_force:
            tag = event.__struct_config__.tag
            raise BadCommit("unknown_type", f"{tag} is of format {since}, and format {in_force} is in force")
