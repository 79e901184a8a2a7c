"""Writes what a run found into `docs/reliability.md`: `python -m tests.chaos.report build/chaos.json`.

The page is prose with a part that is made; several reports follow one another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN = "<!-- made by python -m tests.chaos.report; what is between these lines is written over -->"
END = "<!-- end of what is made -->"


def made(reports: list[dict[str, Any]]) -> str:
    """The made part."""
    return "\n".join([BEGIN, "", *(line for report in reports for line in _section(report)), END])


def _section(report: dict[str, Any]) -> list[str]:
    servers = "one server" if report["servers"] == 1 else f"{report['servers']} servers"
    how = {"netns": "network namespaces", "proxy": "TCP proxies", "none": "nothing"}[report["cuts"]]
    options = f"--seed {report['seed']} --minutes {report['asked_minutes']:g} --round {report['round_seconds']:g}"
    options += f" --drills {report['stalls']['alone']['leader_kills']}"
    if report["servers"] != 3:
        options += f" --servers {report['servers']}"
    alone, among = report["stalls"]["alone"], report["stalls"]["among_other_faults"]
    both = (
        f"writers at most {among['writers']['max']:.1f} s, median {among['writers']['median']:.1f} s; routers "
        f"{among['routers']['max']:.1f} s and {among['routers']['median']:.1f} s"
    )
    rows = [
        ("acknowledged commits tried, lost", f"{report['acknowledged']:,}, {report['lost']}"),
        ("acknowledged events of a group writer", f"{report['acknowledged_events']:,}"),
        ("answers of coordinators that changed something or said that nothing had to", f"{report['answers']:,}"),
        (
            "requests routed; while the log was away; not recorded, by routers that were killed",
            f"{report['routes']:,}; {report['degraded']:,}; {report['unrecorded']:,}",
        ),
        (
            "answers of gateways to their clients",
            ", ".join(f"{count:,} {what}" for what, count in report["gateway_answers"].items()),
        ),
        ("commits on the log", f"{report['commits']:,}"),
        ("faults", ", ".join(f"{count} {what}" for what, count in report["faults"].items())),
        ("ends of processes", ", ".join(f"{count} {how}" for how, count in report["ended"].items())),
        ("starts that found no log, and said so", f"{report['could_not_start']:,}"),
        (
            f"writers stand still after a kill of the leader: {alone['leader_kills']} times and nothing else",
            f"at most {alone['writers']['max']:.1f} s, median {alone['writers']['median']:.1f} s",
        ),
        ("routers do", f"at most {alone['routers']['max']:.2f} s, median {alone['routers']['median']:.2f} s"),
        (f"the same of {among['leader_kills']} among other faults", both),
        (
            f"from the last fault until {report['rounds'][-1]['replicas']} replicas and the history are at one sequence",
            f"at most {max(report['rest_seconds']):.1f} s in {len(report['rest_seconds'])} rounds",
        ),
        ("violations", str(len(report["violations"]))),
    ]
    return [
        f"`python -m tests.chaos {options}`, {report['begun']}: {report['minutes']:g} minutes, {servers}, cut by {how}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in rows),
        "",
    ]


def written(page: str, part: str) -> str:
    """The page with its made part made anew. Raises `ValueError` when it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has lost the lines between which its figures go")
    return before + part + after


def main() -> int:
    """Write the page."""
    reports = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    if not reports:
        sys.stderr.write("name the reports of runs: python -m tests.chaos.report build/chaos.json\n")
        return 2
    PAGE.write_text(written(PAGE.read_text(), made(reports)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
