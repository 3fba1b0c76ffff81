"""A job planned as a Ray task where its ranks will run: on a node with the hardware of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.backends import ray_connection
from orchestrator.backends.protocol import RunFailedError
from orchestrator.backends.room import resources_per_worker
from orchestrator.failures import one_line
from orchestrator.job import JobSpec
from orchestrator.plan_answer import PlanAnswer, planned

# A task whose node was lost is begun again so often.
_MAX_RETRIES = 3


def _planned(data: Mapping[str, Any], folder: str) -> PlanAnswer:
    """What the task does: as anywhere, and it says on which node."""
    answer = planned(data, folder)
    return replace(answer, machine=f"{answer.machine}, node {ray_connection.node_id()}")


def plan_on_cluster(job: JobSpec, *, address: str, is_beside: bool = False) -> PlanAnswer:
    """Plan a job once, with the resources of one of its workers.

    Args:
        job: what to plan.
        address: of the cluster.
        is_beside: workers wait for the plan, and have those resources themselves.

    Raises:
        RunFailedError: the cluster cannot be reached, or the task was lost on it.
    """
    with ray_connection.connected(address, job) as ray:
        need = dict.fromkeys(resources_per_worker(job), 0.0) if is_beside else resources_per_worker(job)
        task = ray.remote(_planned).options(
            num_cpus=need["CPU"],
            num_gpus=need.get("GPU", 0),
            resources={kind: amount for kind, amount in need.items() if kind not in ("CPU", "GPU")},
            max_retries=_MAX_RETRIES,
        )
        try:
            return ray.get(task.remote(job.to_data(), ray_connection.folder_on_workers(job, address)))
        except ray.exceptions.RayError as error:
            raise RunFailedError(f"planning on the Ray cluster failed: {one_line(error)}") from error
