"""Tasks of a Ray cluster: the same calls, wherever it has a free processor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.backends import ray_connection
from orchestrator.backends.protocol import RunFailedError
from orchestrator.backends.tasks import Task, TaskPool
from orchestrator.job import JobSpec

# A run whose node was lost is begun again so often.
_MAX_RETRIES = 3


class _RayTasks:
    """Calls as Ray tasks."""

    def __init__(self, ray: Any, function: Callable[[Task], Any], job: JobSpec, num_slots: int) -> None:
        self.num_slots = num_slots
        self._ray = ray
        self._remote = ray.remote(function).options(
            num_cpus=job.train.threads_per_worker,
            num_gpus=1 if job.train.device == "cuda" else 0,
            max_retries=_MAX_RETRIES,
        )
        self._tasks: dict[Any, Task] = {}

    def submit(self, task: Task) -> None:
        self._tasks[self._remote.remote(task)] = task

    def next_result(self) -> tuple[Task, Any]:
        ready = self._ray.wait(list(self._tasks), num_returns=1)[0][0]
        task = self._tasks.pop(ready)
        try:
            return task, self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunFailedError(f"a run was lost on the Ray cluster: {reason}") from error

    def cancel(self) -> None:
        """End what still runs."""
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)


@contextlib.contextmanager
def ray_tasks(
    function: Callable[[Task], Any], job: JobSpec, *, num_slots: int | None, address: str | None
) -> Iterator[TaskPool]:
    """Slots for the time of the block; what still runs at its end is ended.

    Args:
        function: of a module, so that the cluster's processes find it.
        job: whose threads and device a call needs.
        num_slots: calls at the same time; None for what the cluster has room for.
        address: of a running cluster; None starts one on this machine for the time of the block.

    Raises:
        RunFailedError: the cluster cannot be reached, or has no room for one call.
    """
    with ray_connection.connected(address, job) as ray:
        kind, need = ("GPU", 1) if job.train.device == "cuda" else ("CPU", job.train.threads_per_worker)
        room = int(ray.cluster_resources().get(kind, 0) // need)
        if room < 1:
            raise RunFailedError(
                f"a run needs {need} {kind}, and the Ray cluster has no node with as many", bad_input=True
            )
        pool = _RayTasks(ray, function, job, min(room, num_slots or room))
        try:
            yield pool
        finally:
            pool.cancel()
