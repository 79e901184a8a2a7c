"""What the tests of metrics and health ask: services over HTTP, in this process or in processes of their own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from kvplane.services.observability.web import observing
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvplane.services.observability.collect import Service

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


class Http:
    """A service's HTTP side."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Status, content type and text."""
        return await anyio.to_thread.run_sync(self.ask, path, headers)

    def ask(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str, str]:
        """The same for those who are not in an event loop."""
        request = urllib.request.Request(f"http://{self.address}{path}", headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()
        except OSError as error:
            return 0, "", repr(error)

    async def state(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body of `/healthz` or `/readyz`; status 0 while nobody listens."""
        status, _, text = await self.get(path)
        return status, json.loads(text) if status else {}

    async def metrics(self) -> Metrics:
        """All samples now."""
        _, _, text = await self.get("/metrics", OPENMETRICS)
        return Metrics(text)


class Metrics:
    """The samples of one scrape, read by the client library's parser, which refuses what breaks the format."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels; there must be one."""
        found = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, (name, labels)
        return float(sum(found))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Samples that are not 0, by a label."""
        return {
            sample.labels[label]: sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items() and sample.value
        }


@asynccontextmanager
async def observed(*services: Service) -> AsyncIterator[Http]:
    """Services of this process, observed on a free port."""
    address = f"127.0.0.1:{free_port()}"
    async with observing(address, *services):
        yield Http(address)
