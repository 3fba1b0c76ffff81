"""Plan a job before its ranks start."""

from __future__ import annotations

import functools

import torch

import planner
from orchestrator.job import JobSpec
from orchestrator.run_folder import RunFolder
from orchestrator.worker import make_optimizer, with_loss
from planner import Plan
from planner.strict import WorkloadError


def plan_job(job: JobSpec, folder: RunFolder) -> Plan | None:
    """The plan for one rank of a job, written to the run's folder; None for budget "none".

    A continued run uses the plan that it began with, if the budget and the hardware are still the same.

    Raises:
        planner.InfeasibleError: no plan fits the budget.
        planner.CaptureError: the step cannot be captured.
        WorkloadError: the model, loss or optimizer cannot be made.
    """
    if job.budget == "none":
        return None
    if job.train.device != "cpu" and not torch.cuda.is_available():
        raise WorkloadError(
            "train.device is 'cuda' but this machine has no CUDA device to plan for; plan on one that has"
        )
    # Only shapes matter here: on the meta device parameters take no memory, whatever the model's size.
    with torch.device("meta" if job.train.device == "cpu" else job.train.device):
        model = job.build_model(fake=True)
    plan = planner.plan(
        with_loss(job, model).train(),
        job.example_batch(),
        budget=job.budget,
        hardware=job.hardware,
        optimizer=functools.partial(make_optimizer, job),
        world_size=job.train.workers,
        accumulation=job.train.accumulation,
        time_limit_s=job.solver.time_limit_s,
    )
    plan.save(folder.plan)
    return plan
