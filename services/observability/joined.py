"""Metrics and health of several processes of one service, at one address. Each process answers at a socket of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import aiohttp
import anyio
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from kvplane.services.observability.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from kvplane.services.http.server import Exchange

ANSWER_SECONDS = 5.0

Sockets = Callable[[], Mapping[str, str]]
"""Paths of the sockets of those that run now, by name."""


class _Joined(Collector):
    """Families of several processes, each sample with its process' name."""

    def __init__(self, texts: Mapping[str, str], restarts: int) -> None:
        self._texts = texts
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type, family.unit)
                )
                for name, labels, value, *_ in family.samples:
                    kept.add_sample(name, {**labels, "worker": worker}, value)
        yield from families.values()
        own = Scrape()
        own.put("kvplane_gateway_workers", len(self._texts))
        own.put("kvplane_gateway_worker_restarts_total", self._restarts)
        yield from own.families()


async def _asked(socket: str, path: str) -> tuple[int, str] | None:
    """Status and body of one process' answer; none when it gives none."""
    try:
        async with aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket), timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        ) as session, session.get(f"http://worker{path}") as answer:  # fmt: skip
            return answer.status, await answer.text()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


async def _all(sockets: Mapping[str, str], path: str) -> dict[str, tuple[int, str] | None]:
    answers: dict[str, tuple[int, str] | None] = {}

    async def ask(name: str, socket: str) -> None:
        answers[name] = await _asked(socket, path)

    async with anyio.create_task_group() as group:
        for name, socket in sockets.items():
            group.start_soon(ask, name, socket)
    return {name: answers[name] for name in sockets}


def handler(sockets: Sockets, restarts: Callable[[], int]) -> Callable[[Exchange], Awaitable[None]]:
    """`/metrics` of all of them, and `/healthz` and `/readyz`, which are well when one of them is."""

    async def handle(exchange: Exchange) -> None:
        request = exchange.request
        if request.method not in {b"GET", b"HEAD"}:
            exchange.send(405, [(b"allow", b"GET, HEAD")], b"only GET is answered here")
        elif request.path == b"/metrics":
            answers = await _all(sockets(), "/metrics")
            texts = {name: answer[1] for name, answer in answers.items() if answer is not None and answer[0] == 200}
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Joined(texts, restarts()))
            encode, kind = choose_encoder(request.header(b"accept").decode("latin-1"))
            exchange.send(200, [(b"content-type", kind.encode())], encode(registry))
        elif request.path in {b"/healthz", b"/readyz"}:
            path = request.path.decode()
            _health(exchange, "alive" if path == "/healthz" else "ready", await _all(sockets(), path))
        else:
            exchange.send(404, [], b"there are /metrics, /healthz and /readyz here")

    return handle


def _health(exchange: Exchange, what: str, answers: Mapping[str, tuple[int, str] | None]) -> None:
    well = [name for name, answer in answers.items() if answer is not None and answer[0] == 200]
    ill = {
        name: answer[1] if answer is not None else "it does not answer"
        for name, answer in answers.items()
        if name not in well
    }
    reason = "" if well else "; ".join(f"worker {name}: {why}" for name, why in ill.items()) or "no worker runs"
    body = {what: bool(well), "reason": reason, "workers": well, "others": ill}
    exchange.send(200 if well else 503, [(b"content-type", b"application/json")], json.dumps(body).encode())
