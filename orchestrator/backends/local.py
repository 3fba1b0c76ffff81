"""This machine's processes: one rank runs in this process, several in processes of their own. No Ray."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.backends.attempt import Attempts, of_ranks
from orchestrator.backends.local_ranks import run_ranks
from orchestrator.backends.protocol import Replan
from orchestrator.checkpoint_places import Place
from orchestrator.failures import Failure
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.rank_errors import RankError
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome, train_rank


@dataclass(frozen=True)
class _DirectReporter:
    """Reports by calling a function of this process."""

    on_event: Callable[[Event], None]
    stop: StopSignal

    def emit(self, event: Event) -> None:
        self.on_event(event)

    def stop_requested(self) -> bool:
        return self.stop.requested

    def checkpoint_saved(self, place: Place | None, *, step: int) -> None:
        """Nobody else needs to know."""


def run(
    assignment: Assignment,
    job: JobSpec,
    *,
    on_event: Callable[[Event], None],
    stop: StopSignal,
    replan: Replan | None = None,
) -> Outcome:
    """Run all ranks on this machine, as often as failures of theirs are answered with another attempt.

    Raises:
        RunFailedError: no other attempt follows a failure.
    """
    attempts = Attempts(assignment, job, on_event, stop, replan)
    attempt = _in_this_process if job.train.workers == 1 else run_ranks
    with stop:
        while True:
            ended = attempt(attempts.assignment, job, on_event=attempts.take, stop=stop)
            if isinstance(ended, Outcome):
                return ended
            gc.collect()  # what an attempt in this process had is free before the next one
            attempts.answer(ended)


def _in_this_process(
    assignment: Assignment, job: JobSpec, *, on_event: Callable[[Event], None], stop: StopSignal
) -> Outcome | Failure:
    """One attempt of the only rank."""
    try:
        reporter = _DirectReporter(on_event, stop)
        return train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=reporter)
    except RankError as error:
        return of_ranks({0: error}, {}, world_size=1, timeout=job.train.collective_timeout)
