"""What tenants use, from a gateway's own requests and from what others write on the log."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from kvplane.events.codec import Commit
from kvplane.events.subjects import Place
from kvplane.events.types import RequestCompleted, RequestRouted
from kvplane.projections import tenants
from kvplane.projections.load import ACTIVE_SECONDS
from kvplane.projections.tenants import Excess, Limits, Tenants

if TYPE_CHECKING:
    import pytest


NOW = 1_000_000.0
_NS = 1_000_000_000


def says(used: Tenants, writer: str, *events: RequestRouted | RequestCompleted, at: float = NOW) -> None:
    used.observe(Commit(Place("access", writer), events, writer, 1, None), int(at * _NS))


def routed(request: str, tenant: str = "t", tokens: int = 100) -> RequestRouted:
    return RequestRouted(request, "m", "n", 0, 0, tokens, tenant=tenant)


def completed(request: str, output: int = 0) -> RequestCompleted:
    return RequestCompleted(request, "n", output_tokens=output)


def test_no_minute_has_more_requests_than_it_may() -> None:
    used, limits = Tenants("own"), Limits(requests_per_minute=10)
    let_in: list[float] = []
    for step in range(3000):
        now = NOW + step * 0.1 + (step % 7) * 0.01
        if used.enter("t", limits, now) is None:
            let_in.append(now)
        else:
            excess = used.enter("t", limits, now)
            assert excess is not None
            assert deepcopy(used).of("t", now + excess.seconds).requests < 10
    for begin in let_in:
        assert sum(begin <= at < begin + 60 for at in let_in) <= 10
    # And little less: a second a minute is lost to whole seconds, and the tenant comes back at once.
    assert len(let_in) >= 50


def test_tokens_of_prompts_and_answers_count_and_what_is_refused_does_not() -> None:
    used, limits = Tenants("own"), Limits(tokens_per_minute=1000)
    assert used.enter("t", limits, NOW) is None
    assert used.prompt("t", limits, 600, NOW) is None
    used.over("t", NOW + 1, output=300)
    assert used.enter("t", limits, NOW + 2) is None
    assert used.prompt("t", limits, 101, NOW + 2) == Excess("tokens", 59.0)
    assert used.of("t", NOW).tokens == 900
    assert used.prompt("t", limits, 100, NOW + 2) is None
    assert used.enter("t", limits, NOW + 3) == Excess("tokens", 58.0)
    assert used.prompt("t", limits, 600, NOW + 61) is None


def test_what_others_let_in_counts_and_ones_own_does_not_twice() -> None:
    used, limits = Tenants("own"), Limits(requests_per_minute=3, concurrent=2)
    assert used.enter("t", limits, NOW) is None
    says(used, "own", routed("mine"))
    says(used, "b", routed("one"), routed("u", tenant="u"), routed("nobody", tenant=""))
    assert used.enter("t", limits, NOW) == Excess("concurrent", 0.0)
    # Its end may be told by its node.
    says(used, "node/n", completed("one", output=40))
    assert used.of("t", NOW).tokens == 140
    assert used.enter("t", limits, NOW) is None
    used.over("t", NOW)
    assert used.enter("t", limits, NOW) == Excess("requests", 61.0)
    assert len(used) == 2


def test_an_end_counts_once_and_a_name_that_comes_again_is_another_request() -> None:
    used = Tenants("own")
    says(used, "b", routed("one"), routed("one"), completed("one"), completed("one"), completed("never"))
    assert used.of("t", NOW).elsewhere == 0
    assert used.of("t", NOW).requests == 2


def test_a_gateway_that_is_gone_takes_its_requests_with_it() -> None:
    used = Tenants("own")
    says(used, "b", routed("one"), routed("two"))
    says(used, "c", routed("three"))
    later = NOW + tenants.SILENT_SECONDS + 1
    says(used, "c", completed("another"), at=later)
    assert used.silent_writers(NOW) == set()
    assert used.silent_writers(later) == {"b"}
    assert used.gone("b") == 2
    assert used.of("t", later).running == 1
    assert used.silent_writers(later) == set()


def test_what_nobody_ends_is_over_after_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Tenants("own")
    says(used, "b", routed("one"))
    says(used, "b", routed("two"), at=NOW + ACTIVE_SECONDS + 1)
    assert used.of("t", NOW).elsewhere == 1
    monkeypatch.setattr(tenants, "RUNNING_LIMIT", 5)
    says(used, "b", *(routed(f"r{at}") for at in range(20)), at=NOW + ACTIVE_SECONDS + 2)
    assert used.of("t", NOW).elsewhere == 5


def test_nothing_is_kept_of_those_who_ask_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Tenants("own")
    says(used, "b", *(routed(f"r{at}", tenant=f"t{at}") for at in range(50)))
    says(used, "b", *(completed(f"r{at}") for at in range(50)))
    used.sweep(NOW + 62)
    assert len(used) == 0
    monkeypatch.setattr(tenants, "TENANTS_LIMIT", 10)
    for at in range(50):
        used.enter(f"t{at}", Limits(), NOW)
    assert len(used) == 10
