"""The fold against a second telling of its rules, over random logs: sets of facts, stamps instead of orders, no columns.

`test_fold_model` follows single commits; here time passes, clocks go back, retries and forgeries arrive late, commits
hold many events, and all that the fold says is compared: load, recency, ignored events and counters as well.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.fleet_machine import FleetMachine

TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
