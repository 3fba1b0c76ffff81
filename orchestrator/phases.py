"""Which optimizer and learning-rate schedule a run has: one of each, or others from a step on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orchestrator.job import JobSpec
from orchestrator.optim import build_optimizer
from orchestrator.optim.averaging import keep_average
from orchestrator.techniques.schedules import Schedule, build_schedule
from planner.inputs.long_tail import SECOND_DERIVATIVES
from planner.inputs.strict import WorkloadError


@dataclass(frozen=True)
class Phase:
    """Steps of a run in a row that one optimizer makes.

    Attributes:
        job: whose run.
        key: of the job file that says which optimizer.
        name: of the optimizer.
        hyper: its hyper-parameters as written.
        start_step: steps of the run that are done before.
        is_last: no other comes after it.
    """

    job: JobSpec
    key: str
    name: str
    hyper: dict[str, Any]
    start_step: int
    is_last: bool

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, without weight decay and layer adaptation for biases and normalization.

        The last one keeps the job's average of the weights.

        Raises:
            WorkloadError: its name, a hyperparameter or a value is wrong.
        """
        if self.name in SECOND_DERIVATIVES:
            raise WorkloadError(
                f"{self.key} {self.name!r} needs second derivatives, which a planned step does not compute. "
                "Choose another, or call it in a loop of your own with backward(create_graph=True)"
            )
        try:
            optimizer = build_optimizer(self.name, module, **self.hyper)
        except (ValueError, TypeError, IndexError, RuntimeError, OverflowError) as error:
            raise WorkloadError(f"{self.key} {self.name!r}: {error}. Correct its keys") from error
        average = self.job.train.average
        if average is not None and self.is_last:
            start_step = average.start_step(self.job.train.steps) - self.start_step
            keep_average(optimizer, kind=average.kind, start_step=start_step, decay=average.decay)
        return optimizer

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Schedule:
        """The job's learning-rate schedule from the first step of this phase on.

        Raises:
            WorkloadError: its name, a setting or a value is wrong.
        """
        chosen, steps = self.job.train.schedule, self.job.train.steps
        try:
            return build_schedule(
                optimizer,
                name=chosen.name,
                total_steps=steps,
                first_step=self.start_step,
                **chosen.settings,
            )
        except (TypeError, ValueError) as error:
            raise WorkloadError(f"train.schedule: {error}") from error


def phases_of(job: JobSpec) -> tuple[Phase, ...]:
    """The phases of a run, in their order; they share its learning-rate schedule, each from a rate of its own."""
    first, then = job.optimizer, job.optimizer.then
    if then is None:
        return (Phase(job, "optimizer", first.name, first.hyper, start_step=0, is_last=True),)
    start_step = then.start_step(job.train.steps)
    return (
        Phase(job, "optimizer", first.name, first.hyper, start_step=0, is_last=False),
        Phase(job, "optimizer.then", then.name, then.hyper, start_step=start_step, is_last=True),
    )


def phase_at(phases: tuple[Phase, ...], place: float) -> Phase:
    """The phase of the step that follows when so many are done, counted in steps of the job's own batch."""
    return [phase for phase in phases if phase.start_step <= place][-1]
