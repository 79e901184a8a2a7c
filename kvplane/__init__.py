"""Control plane of a fleet of LLM inference servers.

The one name that an installation adds. `events`, `projections` and `services` are folders of the repository's top level; here
they are links, and in the wheel they lie inside. What programs may count on is in `__all__`, all else may change:

- `Completer` sends OpenAI requests to the engines that a router chooses and records what came of them (`Completion`);
  `connected` makes its connection.
- `View`, `Request` and `Column` are what a policy of your own sees and gives: `score(view, request, parameters) -> Column`.

Completing a request::

    async with kvplane.connected(["nats://127.0.0.1:4222"], "my-program") as client:
        async with kvplane.Completer(client, "default") as completer:
            done = await completer.complete({"model": "m", "messages": [{"role": "user", "content": "Hello"}]})
            print(done.text, done.decision.node, done.usage.cached_tokens)

Each is loaded when it is used, so that importing `kvplane` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvplane.events.log.connection import connected
    from kvplane.services.dataplane.complete import Completer, Completion
    from kvplane.services.routing.roster import Column
    from kvplane.services.routing.view import Request, View

__all__ = ["Column", "Completer", "Completion", "Request", "View", "connected"]

_HOMES = {
    "Column": "services.routing.roster",
    "Completer": "services.dataplane.complete",
    "Completion": "services.dataplane.complete",
    "Request": "services.routing.view",
    "View": "services.routing.view",
    "connected": "events.log.connection",
}


def __getattr__(name: str) -> object:
    """Load what is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvplane' has no attribute {name!r}")
    found: object = getattr(import_module(f"kvplane.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What is here, loaded or not."""
    return sorted({*globals(), *__all__})
