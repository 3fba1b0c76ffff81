"""Why an attempt of all ranks has ended: the likeliest cause among what each of them says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.backends.protocol import Replan, RunFailedError
from orchestrator.failures import Cause, Failure, FailurePolicy, failure_event
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.rank_errors import RankError
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment


def of_ranks(
    errors: Mapping[int, RankError], ended: Mapping[int, str], *, world_size: int, timeout: str
) -> Failure:
    """The failure that the others follow from.

    A rank that waited for others in vain says so; the one that said nothing is the one that did not come.

    Args:
        errors: rank -> what it said.
        ended: rank -> how its process ended without saying anything.
        world_size: how many ranks there are.
        timeout: how long they wait for one another, as written.
    """
    for rank, how in ended.items():
        return Failure(Cause.KILLED, f"rank {rank} {how}", rank)
    order = list(Cause)
    error = min(errors.values(), key=lambda error: order.index(error.cause))
    silent = [rank for rank in range(world_size) if rank not in errors]
    if error.cause is Cause.HANG and silent:
        which = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        message = (
            f"{which} did not come to a collective operation within {timeout}, where rank {error.rank} waited"
        )
        return Failure(Cause.HANG, message, silent[0])
    return Failure(error.cause, str(error), error.rank)


@dataclass
class Attempts:
    """What the attempts of one run have in common: what has been done, and what follows a failure.

    Args:
        assignment: of the next attempt.
        job: what to do.
        on_event: is told everything.
        stop: the user's request to stop.
        replan: see `Backend`.
    """

    assignment: Assignment
    job: JobSpec
    on_event: Callable[[Event], None]
    stop: StopSignal
    replan: Replan | None
    step: int = 0
    started_step: int = 0

    def __post_init__(self) -> None:
        self._policy = FailurePolicy(
            max_failures=self.job.train.max_failures,
            is_planned=self.replan is not None and self.replan.is_planned,
        )

    def take(self, event: Event) -> None:
        """Pass an event on, and remember how far the run is."""
        if event["event"] == "started":
            self.step = self.started_step = event["step"]
        elif event["event"] == "step":
            self.step = event["step"]
        elif event["event"] == "checkpoint":
            self.assignment = dataclasses.replace(self.assignment, must_continue=True)
        self.on_event(event)

    def answer(self, failure: Failure) -> None:
        """Decide what follows, tell it, and make the assignment of the next attempt.

        Raises:
            RunFailedError: no other attempt follows.
        """
        num_steps = self.step - self.started_step
        decision = self._policy.decide(failure, step=self.step, num_steps=num_steps)
        self.on_event(failure_event(failure, decision, step=self.step))
        if decision.action == "stop" or self.stop.requested:
            advises = failure.cause in (Cause.BAD_INPUT, Cause.NOT_FINITE, Cause.STORAGE)
            message = failure.message if advises else f"{failure.message} ({decision.reason})"
            raise RunFailedError(message, bad_input=failure.cause is Cause.BAD_INPUT)
        if decision.action == "replan":
            assert self.replan is not None
            self.assignment = self._continued(self.replan.with_lower_budget())

    def resize(self, workers: int) -> None:
        """Make the assignment of the next attempt, which has another number of workers.

        Raises:
            planner.InfeasibleError: no plan of theirs fits the budget.
        """
        before, self.job = self.job.train.workers, self.job.resized(workers)
        assert self.replan is not None  # the job has a range of workers
        self.assignment = self._continued(self.replan.for_workers(workers))
        event = {"event": "resized", "step": self.step, "before": before, "workers": workers}
        self.on_event({**event, "accumulation": self.job.accumulation, "global_batch": self.job.global_batch})

    def _continued(self, assignment: Assignment) -> Assignment:
        """As it was sent: in the same folder, and never from the beginning where there was a checkpoint."""
        sent = self.assignment
        return dataclasses.replace(assignment, folder=sent.folder, must_continue=sent.must_continue)
