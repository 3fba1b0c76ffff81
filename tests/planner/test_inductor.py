"""The executor inductor: fused kernels under a plan, close to eager, within the promised peak."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planner
from planner.checking.calibrated import calibrated_plan
from planner.checking.check import beside_eager
from planner.checking.node_times import with_measured_times
from planner.checking.real_step import RealStep
from planner.errors import CompilerError
from planner.inputs.workload import SolverSpec
from planner.plan_file import Plan
from planner.prepare import prepare
from tests.models import TinyGPT

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="needs a C++ compiler"
)


class SmallNet(nn.Module):
    """Two convolutions with batch norm, a skip connection, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images)
        return self.head(self.drop((x + self.second(x)).mean((2, 3))))


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def step_of(name: str) -> tuple[nn.Module, RealStep]:
    torch.manual_seed(0)
    if name == "gpt":
        tokens = torch.randint(0, 64, (4, 33))
        model = TinyGPT(layers=1, dropout=0.1)
        return model, RealStep(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), token_loss)
    return SmallNet(), RealStep(torch.randn(4, 3, 12, 12), torch.randint(0, 10, (4,)), F.cross_entropy)


def planned(name: str, budget: str) -> tuple[nn.Module, RealStep, Plan]:
    model, step = step_of(name)
    batch = (step.inputs, step.targets)
    return (
        model,
        step,
        planner.plan(model, batch, loss=step.loss, budget=budget, executor="inductor", time_limit_s=5.0),
    )


@needs_compiler
@pytest.mark.parametrize("name", ["gpt", "convolutions"])
def test_gradients_are_close_to_eager_and_the_peak_is_within_the_budget(name: str):
    model, step = step_of(name)
    prepared = prepare(model, (step.inputs, step.targets), loss=step.loss, executor="inductor")
    for budget in ("none", "1KiB"):
        found = calibrated_plan(
            prepared, model, step, budget=budget, solver=SolverSpec(time_limit="5s"), tightest=True
        )
        check = beside_eager(found, model, step, rounds=1)
        assert check.plan.provenance.executor == "inductor"
        assert check.is_within_budget
        assert abs(check.prediction_error) < 1e-3
        assert bool(check.plan.num_rematerialized) == (budget != "none")
        # Rounding in float32.
        assert max(check.difference.values()) < 1e-4
        # The same numbers were drawn: the generator is where eager leaves it.
        assert check.different["buffers"] != "the random generator"
        assert check.is_as_promised


@needs_compiler
def test_kernels_are_priced_by_the_seconds_that_they_take():
    model, step = step_of("gpt")
    prepared = prepare(model, (step.inputs, step.targets), loss=step.loss, executor="inductor")
    measured = with_measured_times(prepared, copy.deepcopy(model), step, steps=1).problem.costed
    assert measured.cost_model == "measured"
    fused = [k for k, node in enumerate(measured.graph.nodes) if node.op.startswith("fused ")]
    assert fused
    assert all(measured.time_s[k] != prepared.problem.costed.time_s[k] for k in fused)


def test_a_plan_says_for_which_executor_it_is_and_only_that_one_takes_it():
    model, step, plan = planned("gpt", "none")
    assert Plan.from_json(plan.to_json()).provenance.executor == "inductor"
    assert (
        plan.num_nodes
        < planner.plan(model, (step.inputs, step.targets), loss=step.loss, budget="none").num_nodes
    )
    provenance = plan.provenance.model_copy(update={"executor": "aten"})
    other = planner.apply(model, plan.model_copy(update={"provenance": provenance}))
    with pytest.raises(planner.PlanMismatchError, match="another computation"):
        other(step.inputs)


def test_a_plan_of_an_older_file_is_for_the_operations_of_eager_mode():
    model, step = step_of("gpt")
    plan = planner.plan(model, (step.inputs, step.targets), loss=step.loss, budget="none")
    fields: dict[str, Any] = plan.model_dump(mode="json")
    del fields["provenance"]["executor"]
    assert Plan.model_validate(fields).provenance.executor == "aten"


def test_without_a_compiler_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("a-compiler-that-nobody-has",))
    model, step, plan = planned("gpt", "none")
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler. Install g\+\+ .* executor='aten'"):
        planner.apply(model, plan)(step.inputs)
