"""One honest client in a process of its own, so that nobody's load slows its clock: it asks for a route, again and again.

`python -m tests.chaos.witness` writes a line a question to `--out`: when it was asked (monotonic), and the seconds it took.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import anyio

from kvplane.events.log.connection import connected
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.protocol.messages import RouteRequest
from kvplane.services.rpc.client import ask

EVERY_SECONDS = 0.02
PATIENCE_SECONDS = 5.0
"""What took longer counts as so long, or as the time until it was given up."""


async def main() -> None:
    """Ask until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.witness", description=__doc__)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--server", action="append", required=True)
    parser.add_argument("--credentials", type=Path, required=True)
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    request = RouteRequest(model=options.model, tokens=list(range(200)), dry_run=True)
    async with connected(options.server, "witness", credentials=options.credentials, ca=options.ca) as client:
        with options.out.open("a", buffering=1) as out:
            while True:
                begin = time.monotonic()
                try:
                    await ask(client, f"kv.{options.fleet}.route", request, seconds=PATIENCE_SECONDS)
                except ServiceFault as error:
                    # That no node is free is an answer as well.
                    if error.code not in {"no_node", "unknown_model"}:
                        out.write(f"{begin} {max(PATIENCE_SECONDS, time.monotonic() - begin)}\n")
                        continue
                out.write(f"{begin} {time.monotonic() - begin}\n")
                await anyio.sleep(EVERY_SECONDS)


if __name__ == "__main__":
    sys.exit(anyio.run(main, backend_options={"use_uvloop": True}))
