"""Logins in URLs, which nobody is to read who reads a log or an error."""

from __future__ import annotations

import re

_LOGIN = re.compile(r"(?<=://)[^\s/\"'<>]*@")


def without_logins(text: str) -> str:
    """The text, without the user, password or token before the host of any URL in it."""
    return _LOGIN.sub("", text) if "@" in text else text
