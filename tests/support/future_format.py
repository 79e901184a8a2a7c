"""A kvplane of tomorrow: it reads the next format of the log, in which `SessionEnded` says `cause` where it said `reason`.

`python -m tests.support.future_format fold FILE` prints what it makes of a log, everything else is the command line. What is
changed here is what `events.versions` says must be changed for a new shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvplane.events import types, versions


class SessionEnded(types.Event, frozen=True, tag="SessionEnded.2"):
    """Tomorrow's shape."""

    session: types.Name
    model: types.Name
    cause: types.Text = ""


versions.FORMAT += 1
versions.SINCE[SessionEnded] = versions.FORMAT
versions.FORMER["session"] = {
    types.SessionEnded: lambda former: SessionEnded(former.session, former.model, former.reason)
}
types.SessionEvent = types.SessionAssigned | SessionEnded  # type: ignore[assignment]

# The rest of kvplane is made of these as it is loaded.
from kvplane.projections import fleet  # noqa: E402

_begin = fleet.FleetState.__init__


def _and_its_meaning(state: fleet.FleetState, name: str) -> None:
    _begin(state, name)
    state._on_event[SessionEnded] = state._ended


fleet.FleetState.__init__ = _and_its_meaning  # type: ignore[assignment, method-assign]


def main() -> None:
    """Fold a file, or be the command line."""
    if sys.argv[1:2] == ["fold"]:
        from kvplane.projections.overview import summary  # noqa: PLC0415
        from tests.support.log_file import messages_of  # noqa: PLC0415

        state = fleet.FleetState("f")
        for message in messages_of(Path(sys.argv[2])):
            state.apply(message)
        sys.stdout.write(json.dumps(summary(state, digests=True)))
        return
    from kvplane.services.cli import main as command_line  # noqa: PLC0415

    command_line()


if __name__ == "__main__":
    main()
