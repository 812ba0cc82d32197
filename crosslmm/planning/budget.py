"""What a job may spend: hours of one start, dollars of all starts."""

import time

from crosslmm.config import BadConfig
from crosslmm.config.schema import Limit, Section


class Budget(Section):
    """The budget of a job. Without a limit it runs until its work is done."""

    hours: Limit | None = None
    """Wall-clock budget of this start of the job: when it is spent, what is running stops with a checkpoint, and the
    next start resumes it [h]."""
    dollars: Limit | None = None
    """Budget of all starts together; needs `price` [USD]."""
    price: Limit | None = None
    """Price of one training worker [USD/h]."""

    def check_budget(self) -> None:
        """Raise BadConfig if there is no price for the dollars."""
        if self.dollars and not self.price:
            raise BadConfig("--dollars: needs --price, what one training worker costs [USD an hour]")

    def spent(self, seconds: float, worker_seconds: float) -> str | None:
        """Return which limit is reached, in words; None while there is something left.

        Args:
            seconds: of this start [s].
            worker_seconds: time of all training workers, over all starts [s].
        """
        if self.hours and seconds >= self.hours * 3600:
            return f"the {self.hours:g} hours of --hours are spent"
        cost = worker_seconds / 3600 * (self.price or 0)
        if self.dollars and cost >= self.dollars:
            return f"the {self.dollars:g} dollars of --dollars are spent: {worker_seconds / 3600:.2f} worker-hours"
        return None


class Meter:
    """Counts the time of one start of a job, and the worker time of all its starts, from its construction on.

    Args:
        budget: of the job.
        workers: training workers, which all cost money from now on.
        earlier_s: time of all workers in earlier starts [s].
    """

    def __init__(self, budget: Budget, workers: int, earlier_s: float) -> None:
        self.budget, self.workers, self.earlier_s = budget, workers, earlier_s
        self._began = time.monotonic()

    @property
    def worker_seconds(self) -> float:
        """Time of all training workers, over all starts [s]."""
        return self.earlier_s + self._seconds * self.workers

    def spent(self) -> str | None:
        """Return which limit is reached, in words; None while there is something left."""
        return self.budget.spent(self._seconds, self.worker_seconds)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began


NO_BUDGET = Budget()
