"""Policies that fail, each in a way of its own, and some that are odd and do not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvplane.services.routing.view import Request, View


Parameters = dict[str, float]


def raises(_view: View, _request: Request, _parameters: Parameters) -> Any:
    raise ZeroDivisionError


def nan(view: View, _request: Request, _parameters: Parameters) -> Any:
    return [math.nan] * len(view.names)


def plus_infinity(view: View, _request: Request, _parameters: Parameters) -> Any:
    return [*range(1, len(view.names)), math.inf]


def minus_infinity(view: View, _request: Request, _parameters: Parameters) -> Any:
    return [*range(1, len(view.names)), -math.inf]


KEPT = np.array([1.0, 2.0])


def kept(_view: View, _request: Request, _parameters: Parameters) -> Any:
    return KEPT


def short(_view: View, _request: Request, _parameters: Parameters) -> Any:
    return [1.0]


def text(_view: View, _request: Request, _parameters: Parameters) -> Any:
    return "cheap"


def first(view: View, _request: Request, _parameters: Parameters) -> Any:
    return list(range(len(view.names)))
