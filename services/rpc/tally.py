"""What the endpoints of a service have answered: how often, with which outcome, and how long it took."""

from __future__ import annotations

from kvplane.events.durations import MICRO, MILLI, Durations

OK = "ok"


class Tally:
    """Counts of one service, kept by `services.rpc.server`."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], int] = {}
        """Answers by endpoint and outcome: `ok`, or the code of the error."""
        self.seconds: dict[str, Durations] = {}
        """By endpoint, from when a request is taken up until its answer is made."""
        self.bad_traceparents = 0
        """Requests whose traceparent was none."""

    def expect(self, endpoint: str, *, waits: bool) -> None:
        """An endpoint is served; one that never waits is timed more finely."""
        self.answers.setdefault((endpoint, OK), 0)
        self.seconds.setdefault(endpoint, Durations(MILLI if waits else MICRO))

    def add(self, endpoint: str, outcome: str, seconds: float) -> None:
        """A request was answered."""
        key = (endpoint, outcome)
        self.answers[key] = self.answers.get(key, 0) + 1
        self.seconds[endpoint].add(seconds)
