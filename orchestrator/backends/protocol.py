"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome

__all__ = ["Backend", "RunFailedError"]


class Backend(Protocol):
    """Starts the ranks of a run, passes on what they report, and waits for their end."""

    def __call__(
        self, assignment: Assignment, job: JobSpec, *, on_event: Callable[[Event], None], stop: StopSignal
    ) -> Outcome:
        """Run to the end, under `stop` from the time that the ranks can answer it.

        Raises:
            RunFailedError: a rank failed, or the cluster cannot run it.
        """
        ...
