"""A planned step beside eager, for tests: both from the same weights and seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import planner
from planner.checking.compare import first_difference
from planner.checking.real_step import Left, RealStep


def planned_within(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], torch.Tensor], budget: str, **options: Any
) -> planner.Plan:
    """The plan for a budget; for "smallest" the one of the smallest budget that is found."""
    if budget != "smallest":
        return planner.plan(model, batch, loss=loss, budget=budget, **options)
    try:
        return planner.plan(model, batch, loss=loss, budget="1 KB", time_limit_s=1.5, **options)
    except planner.InfeasibleError as error:
        return error.plan


def left_of(module: nn.Module, batch: Any, loss: Callable[[Any, Any], torch.Tensor], steps: int = 2) -> Left:
    """What the last of some steps leaves behind."""
    running = RealStep(batch[0], batch[1], loss).on(module)
    return [running.measured(seed=seed) for seed in range(steps)][-1]


def differences(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], torch.Tensor], plan: planner.Plan
) -> dict[str, str]:
    """What the planned step leaves that eager does not, by kind; all "" where they are equal bit for bit.

    It asserts that the measured peak is within the plan's budget.
    """
    eager = left_of(copy.deepcopy(model), batch, loss)
    planned = left_of(planner.apply(copy.deepcopy(model), plan), batch, loss)
    assert planned.peak_bytes <= plan.budget_bytes
    return first_difference(eager, planned)


EQUAL = {"outputs": "", "gradients": "", "buffers": ""}
