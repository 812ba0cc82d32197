"""What a job may spend."""

import pytest

from crosslmm.config import BadConfig
from crosslmm.planning.budget import NO_BUDGET, Budget, Meter


@pytest.mark.parametrize(
    ("budget", "seconds", "worker_seconds", "reason"),
    [
        (NO_BUDGET, 1e9, 1e9, None),
        (Budget(hours=2), 7199, 1e9, None),
        (Budget(hours=2), 7200, 0, "the 2 hours of --hours are spent"),
        (Budget(dollars=6, price=3), 1e9, 7199, None),
        (Budget(dollars=6, price=3), 0, 7200, "the 6 dollars of --dollars are spent: 2.00 worker-hours"),
        (Budget(price=3), 1e9, 1e9, None),
    ],
)
def test_a_budget_says_which_limit_is_reached(budget, seconds, worker_seconds, reason):
    assert budget.spent(seconds, worker_seconds) == reason


def test_a_meter_counts_all_workers_and_earlier_starts():
    meter = Meter(Budget(dollars=1, price=3600), workers=8, earlier_s=0.5)
    assert 0.5 <= meter.worker_seconds < 0.9
    assert Meter(Budget(dollars=1, price=3600), 8, 1.0).spent()


def test_dollars_without_a_price_are_refused():
    with pytest.raises(BadConfig, match=r"^--dollars: needs --price"):
        Budget(dollars=1).check_budget()
