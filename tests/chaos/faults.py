"""Which faults, when, and for how long: drawn from a seed, the same every time, and nothing but the seed decides.

Three lanes run side by side: servers, services, and the network of services. In the lane of servers one thing happens at
a time, so that two of three servers are always there, but for the phase at the end that takes two down, or all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

LANES = ("servers", "services", "network")
SETTLE_SECONDS = 4.0
"""Between two faults of servers, at the least: a server that was away has to catch up, or two are missing in fact."""


class Fault(NamedTuple):
    """One fault: `target` is a process, a role (`leader`), or several joined by a comma; what it means is in `play`."""

    at: float
    what: str
    target: str
    seconds: float

    def line(self) -> str:
        """For people."""
        return f"{self.at:7.2f} s  {self.what:<18} {self.target:<28} {self.seconds:5.2f} s"


class Ground(NamedTuple):
    """What there is to be attacked."""

    servers: Sequence[str]
    services: Sequence[str]
    cuts: bool


def _server(rng: random.Random, ground: Ground) -> str:
    return "leader" if rng.random() < 0.5 else rng.choice(ground.servers)


def _service(rng: random.Random, ground: Ground) -> str:
    return rng.choice(ground.services)


def _short(rng: random.Random) -> float:
    """Mostly short, sometimes long: between 0.1 and 20 seconds."""
    return 0.1 * math.pow(200, rng.random())


def _cut(rng: random.Random) -> float:
    """Between 0.5 and 30 seconds."""
    return 0.5 * math.pow(60, rng.random())


def _away(rng: random.Random) -> float:
    """How long a process that was ended stays away."""
    return 0.1 * math.pow(60, rng.random())


Kind = tuple[str, float, Callable[[random.Random, Ground], str], Callable[[random.Random], float]]

_SERVERS: list[Kind] = [
    ("kill", 5, _server, _away),
    ("pause", 3, _server, _short),
    ("restart", 2, _server, _away),
    ("lame duck", 0.5, _server, _away),
    ("stutter", 1, _server, _short),
]
_SERVER_CUTS: list[Kind] = [
    ("cut from servers", 2, _server, _cut),
    ("deaf to servers", 1.5, _server, _cut),
    ("mute to servers", 1.5, _server, _cut),
    ("cut from all", 2, _server, _cut),
]
_SERVICES: list[Kind] = [
    ("kill", 5, _service, _away),
    ("pause", 3, _service, _short),
    ("restart", 2, _service, _away),
    ("stutter", 1, _service, _short),
]
_NETWORK: list[Kind] = [
    ("cut from servers", 3, _service, _cut),
    ("deaf to servers", 1, _service, _cut),
    ("mute to servers", 1, _service, _cut),
    ("cut from one", 2, _service, _cut),
]


def schedule(seed: int, number: int, seconds: float, ground: Ground) -> list[Fault]:
    """Faults of one round. Every third round leaves the servers alone: the log is there, and no excuse holds.

    Every other round ends with two servers down or all of them, if it is long enough.
    """
    rng = random.Random(f"{seed} {number} {ground.cuts} {len(ground.servers)}")
    calm = number % 3 == 2
    found: list[Fault] = []
    last = seconds
    if not calm and number % 2 == 0 and seconds >= 40:
        last = seconds - 10
        down = rng.choice(["two", "all"])
        found.append(Fault(round(last, 2), "kill", down, round(rng.uniform(0.5, 6), 2)))
    clustered = len(ground.servers) > 1
    lanes: list[tuple[list[Kind], float, float]] = [(_SERVICES, 0.3, 4.0)]
    if not calm:
        kinds = [kind for kind in _SERVERS if clustered or kind[0] != "lame duck"]
        lanes.append((kinds + (_SERVER_CUTS if ground.cuts and clustered else []), SETTLE_SECONDS, 10.0))
        if ground.cuts:
            lanes.append((_NETWORK, 1.0, 10.0))
    for kinds, least, most in lanes:
        at = rng.uniform(0.5, most / 2)
        while at < last:
            what, _, target, length = rng.choices(kinds, [kind[1] for kind in kinds])[0]
            fault = Fault(round(at, 2), what, target(rng, ground), round(min(length(rng), seconds / 3), 2))
            found.append(fault)
            # Services are attacked side by side; a lane with a settling time does one thing after the other.
            at += rng.uniform(least, most) + (fault.seconds if least >= 1 else 0)
    return sorted(found)
