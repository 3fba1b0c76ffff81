"""Plan the step of one rank of a job."""

from __future__ import annotations

import torch

from orchestrator.checkpoint_places import check_place
from orchestrator.job import JobSpec
from orchestrator.mlflow_run import check_mlflow_installed
from orchestrator.phases import phases_of
from orchestrator.worker import with_loss
from planner import Plan
from planner.checking.from_file import Checked, checked_workload
from planner.inputs.workload import Workload
from planner.lower.fakes import building_without_memory
from planner.measure import threads
from planner.pipeline import plan_prepared
from planner.prepare import prepare_workload
from planner.prepared import Prepared


def check_job(job: JobSpec) -> None:
    """Make what the ranks will make, without memory: what is wrong with a job is better said before they start.

    Raises:
        WorkloadError: the model, loss, optimizer, schedule or data callable cannot be made, nothing can be
            written where the checkpoints are to lie, or MLflow is named and not installed.
    """
    assert job.micro_batch >= 1
    with building_without_memory(), torch.device(job.train.device):
        model = with_loss(job, job.build_model(fake=True))
        for phase in phases_of(job):
            phase.make_schedule(phase.make_optimizer(model))
    job.train.data.resolve()
    train = job.train
    if train.mlflow is not None:
        check_mlflow_installed(train.mlflow)
    if train.checkpoint_dir is not None:
        is_one_process = train.backend == "local" and train.workers == 1
        check_place(train.checkpoint_dir, is_one_process=is_one_process)


def plan_job(job: JobSpec) -> Plan:
    """What each rank of a job retains and rematerializes, with its optimizer, ranks and micro-batches charged.

    Raises:
        planner.InfeasibleError: no plan fits the budget.
        planner.CaptureError: the step cannot be captured.
        WorkloadError: the model, loss or optimizer cannot be made.
    """
    return plan_prepared(prepare_job(job), job)


def prepare_job(job: JobSpec) -> Prepared[Plan]:
    """The step of each rank of a job, ready to be planned; raises what `plan_job` raises but InfeasibleError."""
    with threads(job.train.threads_per_worker):
        return prepare_workload(
            job,
            device=job.train.device,
            optimizer=[phase.make_optimizer for phase in phases_of(job)],
            world_size=job.train.workers,
            accumulation=job.planned_accumulation,
            sharding=job.train.sharding,
        )


def prepare_step(workload: Workload) -> Prepared[Plan]:
    """The step of a job's rank, or of a workload that says nothing of training: one rank without accumulation."""
    return prepare_job(workload) if isinstance(workload, JobSpec) else prepare_workload(workload)


def check_step(workload: Workload) -> Checked:
    """The step of one rank that trains alone, built really, with a job's (first) optimizer and micro-batches."""
    if not isinstance(workload, JobSpec):
        return checked_workload(workload)
    train = workload.train
    with threads(train.threads_per_worker):
        return checked_workload(
            workload,
            device=train.device,
            optimizer=phases_of(workload)[0].make_optimizer,
            accumulation=workload.planned_accumulation,
        )
