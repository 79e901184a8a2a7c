"""docs/metrics.md, made from the catalog: python -m kvplane.services.observability > docs/metrics.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.observability.catalog import EVERY, GROUPS

if TYPE_CHECKING:
    from kvplane.services.observability.catalog import Family

_BEGIN = f"""\
# Metrics and health

Every service answers HTTP if given an address: `kvplane router --http 0.0.0.0:9464`, or `KVPLANE_HTTP`. `kvplane up` does so
at `127.0.0.1:9464` by itself, and its historian at the port after it.

| path | answers |
|---|---|
| `/metrics` | what is below, in Prometheus' text or OpenMetrics, as the scraper asks for |
| `/healthz` | 200 while the event loop turns and the connection is listened to, else 503: start the service anew |
| `/readyz` | 200 when the service can do its work, else 503 with the reason |

These are not ready: a service that has not read all of the log yet; a coordinator that can't reach the log; simulated nodes
before they are registered; and an adapter while one of its nodes is not registered, its engine is not well, or it can't reach
the log.

A router that can't reach the log stays ready and says `degraded`: it still answers from memory, and a new router would know
nothing. A historian that can't store stays ready, too. `/healthz` says nothing about the NATS server: when the log can't be
reached, starting a service again does not help. A connection whose read loop ended is made again within a second and counted;
when that happens four times in a minute the service ends, with the reason and exit code 1.

Values are read at the moment of a scrape. Nearly all metrics have the labels
{" and ".join(f"`{label}`" for label in EVERY)} (`router`, `gateway`, `coordinator`, `historian`, `simnode` or `adapter`).
Metrics of the process (`process_*`, `python_*`) are the client library's.
"""
_QUERIES = """\
## Questions

| question | PromQL |
|---|---|
| hit rate | `sum(rate(kvplane_router_matched_blocks_total[5m])) / sum(rate(kvplane_router_asked_blocks_total[5m]))` |
| decisions a second | `sum by (kind) (rate(kvplane_router_decisions_total[1m]))` |
| refused, by code | `sum by (outcome) (rate(kvplane_requests_total{endpoint="route", outcome!="ok"}[5m]))` |
| decision time, p99 | `histogram_quantile(0.99, sum by (le) (rate(kvplane_router_decision_seconds_bucket[5m])))` |
| cache in use | `max by (node, tier) (kvplane_node_used_blocks) / max by (node, tier) (kvplane_node_capacity_blocks)` |
| is a replica behind? | `max by (instance) (kvplane_log_lag_commits)` |
"""


def make() -> str:
    """The whole document."""
    lines = [_BEGIN]
    for group in GROUPS:
        lines += [f"## {group.title}", "", "| metric | type | labels | meaning | look when |", "|---|---|---|---|---|"]
        lines += [_row(family) for family in group.families]
        lines.append("")
    return "\n".join([*lines, _QUERIES])


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels if label not in EVERY)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.meaning} | {family.watch} |"
