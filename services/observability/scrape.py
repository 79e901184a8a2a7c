"""What one scrape finds: samples by name, as the families that `prometheus_client` writes."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from kvplane.services.observability.catalog import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric

    from kvplane.events.durations import Durations

_UNITS = ("seconds", "bytes")
_MAKERS = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class Scrape:
    """Samples of one scrape. A name or label that the catalog doesn't have is a `KeyError`."""

    def __init__(self, common: Mapping[str, str] | None = None, families: dict[str, Metric] | None = None) -> None:
        self._common = common or {}
        self._families = {} if families is None else families

    def of(self, **common: str) -> Scrape:
        """The same scrape with other common labels."""
        return Scrape(common, self._families)

    def put(self, name: str, value: float, **labels: str) -> None:
        """One value of a counter or gauge."""
        self._family(name).add_metric(self._labels(name, labels), value)  # type: ignore[attr-defined]

    def put_durations(self, name: str, durations: Durations, **labels: str) -> None:
        """A histogram."""
        bounds = [*map(floatToGoString, durations.bounds), "+Inf"]
        counts = zip(bounds, accumulate(durations.counts), strict=True)
        self._family(name).add_metric(self._labels(name, labels), list(counts), durations.total)  # type: ignore[attr-defined]

    def families(self) -> Iterator[Metric]:
        """All that was found, in the order of the catalog."""
        return (self._families[name] for name in BY_NAME if name in self._families)

    def _family(self, name: str) -> Metric:
        found = self._families.get(name)
        if found is None:
            known = BY_NAME[name]
            bare = name.removesuffix("_total")
            unit = next((unit for unit in _UNITS if bare.endswith(f"_{unit}")), "")
            found = _MAKERS[known.kind](bare, known.meaning, labels=known.labels, unit=unit)
            self._families[name] = found
        return found

    def _labels(self, name: str, labels: dict[str, str]) -> list[str]:
        given = {**self._common, **labels}
        wanted = BY_NAME[name].labels
        if unknown := labels.keys() - set(wanted):
            raise KeyError(f"{name} has no label {', '.join(unknown)}")
        return [given[label] for label in wanted]
