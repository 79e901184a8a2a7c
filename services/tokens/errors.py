"""What can't be done here."""

from __future__ import annotations


class Elsewhere(Exception):
    """The tokens of this request are known to an engine only; the text says why."""


class Unusable(Exception):
    """A model's files can't be used; the text says what is wrong with which."""
