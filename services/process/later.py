"""Modules that are loaded when something in them is used, although somebody imports them before, or not at all."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

_lock = RLock()


def later(name: str) -> None:
    """Have `import name` load nothing until something in the module is asked for.

    Nothing changes when it is loaded already, or not installed. (`importlib.util.LazyLoader` loads at the import statement:
    that asks for the module's `__spec__`.)
    """
    if name in sys.modules or (spec := find_spec(name)) is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    module.__class__ = _Later
    sys.modules[name] = module


def without(name: str, other: str) -> None:
    """Load a module that would use another one if it were there, as if it were not. What is loaded already stays as it is."""
    if name in sys.modules or other in sys.modules:
        return
    sys.modules[other] = None  # type: ignore[assignment]
    try:
        import_module(name)
    finally:
        del sys.modules[other]


class _Later(ModuleType):
    """A module that is loaded when it is asked for what it has not got."""

    _begun = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module has
        # Whoever else asks meanwhile waits; what it asks for itself while it is loaded, it has or has not.
        with _lock:
            if not self._begun and self.__spec__ is not None and self.__spec__.loader is not None:
                self._begun = True
                self.__spec__.loader.exec_module(self)
                return getattr(self, name)
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
