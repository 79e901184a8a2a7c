"""Which version of kvplane this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("kvplane")
    except PackageNotFoundError:
        return "0.0.0"
