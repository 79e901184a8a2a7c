"""`python -m tests.chaos`: a run of so many minutes, its schedule and its report."""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from pathlib import Path
from tempfile import mkdtemp

import anyio
import structlog

from tests.chaos.harm import ATTACKERS
from tests.chaos.run import ROUND_SECONDS, Run, Settings


def main() -> int:
    """Run, print, and say by the exit code whether it held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--seed", type=int, help="what faults are drawn from (default: a new one)")
    parser.add_argument("--servers", type=int, choices=[1, 3], default=3, help="NATS servers (default: 3)")
    parser.add_argument(
        "--cuts", choices=["auto", "netns", "proxy", "none"], default="auto",
        help="how the network is cut (default: network namespaces as root, otherwise proxies)",
    )  # fmt: skip
    parser.add_argument(
        "--round", type=float, default=ROUND_SECONDS, help="seconds of faults between two checks (default: %(default)g)"
    )
    parser.add_argument(
        "--drills", type=int, help="kill the leader so often before, alone (default: 5 in a run of 5 minutes)"
    )
    parser.add_argument(
        "--hostile",
        nargs="*",
        choices=ATTACKERS,
        metavar="ROLE",
        help="members with valid credentials do their worst: node, client, historian (default: all three)",
    )
    parser.add_argument("--out", type=Path, help="where the report goes, as JSON")
    parser.add_argument("--folder", type=Path, help="where logs, ledger and schedules go (default: a new one)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    folder = options.folder or Path(mkdtemp(prefix="kvplane-chaos-"))
    hostile = () if options.hostile is None else tuple(options.hostile) or ATTACKERS
    settings = Settings(
        seed=seed, hostile=hostile, minutes=options.minutes,
        servers=options.servers, cuts=options.cuts, round_seconds=options.round,
        drills=options.drills if options.drills is not None else 5 if options.minutes >= 5 and options.servers > 1 else 0,
    )  # fmt: skip
    # The fleet's own logs lie in the folder; what this process's clients live through is no news.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    report = anyio.run(Run(folder, settings, say).go, backend_options={"use_uvloop": True})
    shown = {key: value for key, value in report.items() if key not in {"schedules", "rounds", "load"}}
    say(json.dumps(shown, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        say(f"`python -m tests.chaos.report {options.out}` writes these figures into docs/reliability.md")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
