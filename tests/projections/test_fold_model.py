"""The fold against a naive reference, over random histories: epochs, duplicates, old news, bad commits of every sort."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.fold_machine import FoldMachine

TestFold = FoldMachine.TestCase
TestFold.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
