"""The step that a file names, built really."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from planner.checking.real_step import RealStep
from planner.inputs.workload import Workload
from planner.plan_file import Plan
from planner.prepare import prepare_workload
from planner.prepared import Prepared
from planner.step import StepModule


@dataclass(frozen=True)
class Checked:
    """What a check needs.

    Attributes:
        prepared: the step of one rank.
        module: real, in training mode.
        step: batch, loss and optimizer.
        num_threads: of the rank; it must run with as many as it was planned with.
    """

    prepared: Prepared[Plan]
    module: nn.Module
    step: RealStep
    num_threads: int


def checked_workload(
    workload: Workload,
    *,
    device: str = "cpu",
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    accumulation: int = 1,
) -> Checked:
    """The step of one rank that trains alone, with its first optimizer; the loss lies inside the module.

    Args:
        workload: model, batch, loss, optimizer, hardware.
        device: type of the device that it runs on.
        optimizer: builds the optimizer of a module; None takes the workload's first.
        accumulation: micro-batches in one step of the optimizer.

    Raises:
        WorkloadError: model, batch, loss or optimizer cannot be made.
        CaptureError, ValueError: as for `planner.plan`.
    """
    optimizer = optimizer or workload.optimizer.factories()[0]
    prepared = prepare_workload(workload, device=device, optimizer=optimizer, accumulation=accumulation)
    loss = workload.loss_fn()
    torch.manual_seed(0)
    model = workload.build_model(fake=False).to(device)
    with torch.device(device):
        inputs, targets = workload.example_batch()
    module = (model if loss is None else StepModule(model, loss)).train()
    step = RealStep(
        inputs=inputs if loss is None else (inputs, targets), optimizer=optimizer, accumulation=accumulation
    )
    return Checked(prepared, module, step, torch.get_num_threads())
