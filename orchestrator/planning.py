"""Plan the step of one rank of a job."""

from __future__ import annotations

import functools

from orchestrator.job import JobSpec
from orchestrator.worker import make_optimizer
from planner import Plan
from planner.pipeline import plan_workload
from planner.workload import Workload


def plan_job(job: JobSpec) -> Plan:
    """What each rank of a job retains and rematerializes, with its optimizer, ranks and micro-batches charged.

    Raises:
        planner.InfeasibleError: no plan fits the budget.
        planner.CaptureError: the step cannot be captured.
        WorkloadError: the model, loss or optimizer cannot be made.
    """
    return plan_workload(
        job,
        device=job.train.device,
        optimizer=functools.partial(make_optimizer, job),
        world_size=job.train.workers,
        accumulation=job.train.accumulation,
    )


def plan_step(workload: Workload) -> Plan:
    """The plan of a job's rank, or of a workload that says nothing of training: one rank without accumulation."""
    return plan_job(workload) if isinstance(workload, JobSpec) else plan_workload(workload)
