"""The actor between the ranks of a Ray run and its driver: what is reported, what is asked, what is decided."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backends.attempt import of_ranks
from orchestrator.backends.ray_gauges import RayGauges
from orchestrator.checkpoint_places import Place
from orchestrator.failures import Failure
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.rank_errors import RankError
from orchestrator.worker import Assignment

_POLL_S = 0.1


@dataclass(frozen=True)
class GroupEnded:
    """Ray has seen that a group of workers failed, and will start another.

    Attributes:
        ranks: rank -> whether it was lost, in the place of raising something.
    """

    ranks: Mapping[int, bool]

    def failure(self, errors: Mapping[int, RankError], job: JobSpec) -> Failure:
        """Why.

        Args:
            errors: rank -> what it has said.
            job: whose ranks they are.
        """
        gone = [rank for rank, is_lost in self.ranks.items() if is_lost and rank not in errors]
        lost = dict.fromkeys(gone, "was lost with its process")
        timeout = job.train.collective_timeout
        return of_ranks(errors, lost, world_size=job.train.workers, timeout=timeout)


@dataclass(frozen=True)
class SizeWanted:
    """Ray has started a group of so many workers, and nothing is assigned to as many."""

    workers: int


class Mailbox:
    """Holds letters for the driver, its request to stop, and the assignment of the next attempt.

    Its methods do not wait: an actor with one that does may take letters out of their order.
    """

    def __init__(self, assignment: Assignment) -> None:
        self._letters: list[Any] = []
        self._stop = False
        self._assignment: Assignment | None = assignment
        self._is_wanted = False
        self._gauges = _gauges(Path(assignment.run_dir).name)

    def put(self, letter: Any) -> None:
        """Leave a letter for the driver; that a group has ended withdraws the assignment until it has decided."""
        self._letters.append(letter)
        if isinstance(letter, GroupEnded):
            self._assignment = None
        elif isinstance(letter, dict):
            self._gauges.show(letter)

    def take(self) -> list[Any]:
        """All letters since the last call."""
        letters, self._letters = self._letters, []
        return letters

    def assign(self, assignment: Assignment) -> None:
        """What the next attempt is to do."""
        self._assignment, self._is_wanted = assignment, False

    def assignment(self, workers: int) -> Assignment | None:
        """The same; None while the driver has not decided, or not yet for so many workers."""
        assignment = self._assignment
        if assignment is None or assignment.job["train"]["workers"] == workers:
            return assignment
        if not self._is_wanted:
            self._is_wanted = True
            self._letters.append(SizeWanted(workers))
        return None

    def stop(self) -> None:
        """Ask the ranks to stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether the ranks are asked to stop."""
        return self._stop


def _gauges(run: str) -> RayGauges:
    from ray.util.metrics import Gauge

    return RayGauges(Gauge, run)


def next_assignment(ray: Any, mailbox: Any, *, workers: int) -> Assignment:
    """Wait for what the driver has decided for so many workers."""
    assignment: Assignment | None = None
    while assignment is None:
        assignment = ray.get(mailbox.assignment.remote(workers))
        time.sleep(0.0 if assignment else _POLL_S)
    return assignment


def group_watch(ray: Any, mailbox: Any) -> Any:
    """What Ray Train's controller calls when workers fail: it tells the driver before others are started."""

    class GroupWatch(ray.train.UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            lost = {rank: _is_of_ray(error) for rank, error in worker_exceptions.items()}
            ray.get(mailbox.put.remote(GroupEnded(lost)))

    return GroupWatch()


def _is_of_ray(error: Exception) -> bool:
    """Whether Ray found a worker gone, in the place of the worker raising something."""
    return type(error).__name__.startswith("WorkerHealthCheck")


class RayReporter:
    """Reports through the mailbox without waiting for it."""

    def __init__(self, ray: Any, mailbox: Any, run_dir: str) -> None:
        self._ray, self._mailbox, self._run_dir = ray, mailbox, run_dir
        self._answer: Any = None
        self._stop = False

    def emit(self, event: Event) -> None:
        """Without waiting for it to arrive."""
        self._mailbox.put.remote(event)

    def stop_requested(self) -> bool:
        """The newest answer that has arrived; a question is always on its way."""
        if self._answer is None:
            self._answer = self._mailbox.stop_requested.remote()
        ready, _ = self._ray.wait([self._answer], timeout=0)
        if ready:
            self._stop = self._stop or bool(self._ray.get(self._answer))
            self._answer = None
        return self._stop

    def checkpoint_saved(self, place: Place | None, *, step: int) -> None:
        """Let Ray Train know the checkpoint where it lies in the run's storage; nothing is copied."""
        train = self._ray.train

        is_in_run = isinstance(place, Path) and place.is_relative_to(self._run_dir)
        checkpoint = train.Checkpoint.from_directory(str(place)) if is_in_run else None
        train.report(
            {"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD
        )
