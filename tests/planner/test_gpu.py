"""On a CUDA device: the results of eager, the promised peak, both executors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from planner.checking.check import check
from planner.checking.real_step import RealStep
from planner.inputs.workload import SolverSpec
from planner.prepare import prepare
from tests.models import TinyGPT, token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def step() -> tuple[nn.Module, RealStep]:
    torch.manual_seed(0)
    batch = [torch.randint(0, 64, (32, 256), device="cuda") for _ in range(2)]
    return TinyGPT(width=256, layers=6, dropout=0.1).cuda(), RealStep(*batch, loss=token_loss)


@pytest.mark.parametrize("budget", ["none", "60%"])
@pytest.mark.parametrize("executor", ["aten", "inductor"])
def test_a_planned_step_is_eagers_within_its_budget_and_near_its_prediction(executor: Any, budget: str):
    model, real = step()
    prepared = prepare(model, (real.inputs, real.targets), loss=real.loss, executor=executor)
    found = check(prepared, copy.deepcopy(model), real, budget=budget, solver=SolverSpec(), rounds=3)
    assert found.is_as_promised
    assert found.is_within_budget
    assert abs(found.prediction_error) <= 0.03
