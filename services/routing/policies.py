"""Policies: what it would cost to send a request to each node. The node with the least cost is chosen.

A policy is a function `score(view, request, parameters) -> costs`: one number a candidate, in any unit, as long as less
is better. A `View` is columns (NumPy arrays), one entry a candidate, so that a policy is an expression and stays fast at
1,000 nodes. Built-in policies are in `POLICIES`, each with its parameters; `module:attr` names any other function of
this form, which gets the parameters as they were set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

from kvplane.services.protocol.errors import BadRequest
from kvplane.services.routing import classic
from kvplane.services.routing.holding import HOLD
from kvplane.services.routing.parameters import Parameter
from kvplane.services.routing.roster import Column
from kvplane.services.routing.ttft import TTFT, ttft, ttft_terms
from kvplane.services.routing.view import Request, View

Score = Callable[[View, Request, dict[str, float]], "Column | Sequence[float]"]
"""A policy: one cost a candidate; less is better."""

Terms = Callable[[View, Request, dict[str, float]], Mapping[str, Column]]
"""The parts of a policy's costs by name, each with one entry a candidate."""


class Policy(NamedTuple):
    """A policy and what can be set about it; `parameters` is none when anything can."""

    score: Score
    parameters: Mapping[str, Parameter] | None
    terms: Terms | None = None
    """What its costs are made of, for those who ask why; their sum is the cost."""

    @property
    def summary(self) -> str:
        """The policy in a sentence."""
        return (self.score.__doc__ or "").strip().partition("\n\n")[0].replace("\n    ", " ")

    def complete(self, given: Mapping[str, float]) -> dict[str, float]:
        """All parameters: those given, and the defaults of the others."""
        if self.parameters is None:
            return dict(given)
        return {name: given.get(name, parameter.default) for name, parameter in self.parameters.items()}


POLICIES: dict[str, Policy] = {
    "round_robin": Policy(classic.round_robin, {}),
    "least_loaded": Policy(classic.least_loaded, {}),
    "session": Policy(classic.session, {}),
    "cascade": Policy(classic.cascade, {}),
    "threshold": Policy(classic.threshold, classic.THRESHOLD),
    "blocks": Policy(classic.blocks, classic.BLOCKS, classic.blocks_terms),
    "e2": Policy(classic.e2, classic.E2),
    "ttft": Policy(ttft, TTFT, ttft_terms),
}


_allowed: set[str] = set()


def allow(modules: Iterable[str]) -> None:
    """Let policies be taken from these modules. What the log names is imported from nowhere else."""
    _allowed.update(modules)


def policy(name: str) -> Policy:
    """A policy by its name, or by `module:attr` of a module that was allowed. Raises `BadRequest`."""
    known = POLICIES.get(name)
    if known is not None:
        return known
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BadRequest(f"policy {name!r} is not one of {', '.join(POLICIES)}, nor of the form module:attr")
    if module not in _allowed:
        raise BadRequest(
            f"module {module[:80]!r} may not be used; start routers and coordinators with --policy-module {module[:80]}"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - importing runs anybody's code
        raise BadRequest(f"policy {name!r} can't be imported: {error}") from None
    if not callable(found):
        raise BadRequest(f"policy {name!r} is not a function")
    return Policy(found, None)


def check(name: str, parameters: Mapping[str, float]) -> None:
    """Raise `BadRequest` unless there is such a policy and it has these parameters, within their limits."""
    known = policy(name).parameters
    if known is None:
        known = {parameter: Parameter(0, "", "", least=-math.inf) for parameter in parameters}
    known = {**known, **HOLD}
    for parameter, value in parameters.items():
        if parameter not in known:
            raise BadRequest(f"policy {name} has no parameter {parameter[:80]!r}; it has {', '.join(known)}")
        if not known[parameter].least <= value <= known[parameter].most:
            raise BadRequest(
                f"{parameter} is {value:g}; it must be from {known[parameter].least:g} to {known[parameter].most:g}"
            )
