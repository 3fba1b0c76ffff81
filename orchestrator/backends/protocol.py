"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome

__all__ = ["Backend", "Replan", "RunFailedError"]


class Replan(Protocol):
    """Makes the assignment of an attempt that cannot be the one before."""

    def with_lower_budget(self) -> Assignment:
        """For less memory than a rank had none for.

        Raises:
            planner.InfeasibleError: no plan fits that.
        """
        ...

    def for_workers(self, workers: int) -> Assignment:
        """For another number of workers of the job's range, and the same global batch.

        Raises:
            planner.InfeasibleError: no plan of theirs fits the budget.
        """
        ...

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan, whose budget can be lowered."""
        ...


class Backend(Protocol):
    """Starts the ranks of a run, passes on what they report, and waits for their end."""

    def __call__(
        self,
        assignment: Assignment,
        job: JobSpec,
        *,
        on_event: Callable[[Event], None],
        stop: StopSignal,
        replan: Replan | None = None,
    ) -> Outcome:
        """Run to the end, under `stop` from the time that the ranks can answer it.

        Each failure of the ranks is answered by what `FailurePolicy` decides, and told as an event.

        Args:
            replan: makes the assignment that follows too little memory, or another number of workers.

        Raises:
            RunFailedError: the ranks failed for good, or the cluster cannot run it.
        """
        ...
