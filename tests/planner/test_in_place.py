"""Calls that write over an input that nothing else reads."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planner.capturing.in_place import in_place_of
from planner.graph import Graph
from planner.prepare import prepare
from planner.schedule import Compute, Free, Schedule
from planner.solution import Solution, Status
from tests.planner.steps import EQUAL, differences, left_of, planned_within

aten = torch.ops.aten


def mean_of(outputs: torch.Tensor, _: Any) -> torch.Tensor:
    return outputs.square().mean()


def graph_of(model: nn.Module, x: torch.Tensor) -> Graph:
    return prepare(model.train(), (x, None), loss=mean_of).problem.costed.graph


def ops_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [node.op for node in graph_of(model, x).nodes]


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (aten.add.Tensor, aten.add_.Tensor),
        (aten.relu.default, aten.relu_.default),
        (aten.div.Scalar, aten.div_.Scalar),
        (aten.threshold_backward.default, None),  # has no form that writes over its argument
        (aten.mm.default, None),
        (aten.cumsum.default, None),  # has one, but is not pointwise
        (aten.bernoulli.p, None),
    ],
)
def test_only_pointwise_operators_have_a_form_that_is_used(operator: Any, expected: Any):
    assert in_place_of(operator) == expected


class Residual(nn.Module):
    """A product whose result is added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.second(x).relu()


def test_gradients_of_a_residual_are_added_up_in_place_as_autograd_does():
    ops = ops_of(Residual(), torch.randn(8, 32))
    assert "aten.addmm.default + aten.relu_.default" in ops
    # The gradient that comes through the second layer, made last, takes the other one in.
    assert "aten.mm.default + aten.add_.Tensor" in ops
    assert not any(op.startswith("aten.add.Tensor") for op in ops[ops.index("aten.mm.default") :])


def test_what_something_else_reads_is_not_written_over():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            # y is read twice; its square keeps it for backward; the transposed one has another layout.
            return y.relu() * y + y.neg().t().contiguous().t() + y.square()

    torch.manual_seed(0)
    model, x = Twice().train(), torch.randn(32, 32)
    assert "aten.addmm.default" in ops_of(model, x)
    for budget in ("none", "smallest"):
        plan = planned_within(model, (x, None), mean_of, budget)
        assert differences(model, (x, None), mean_of, plan) == EQUAL


def test_outputs_inputs_and_parameters_are_never_written_over():
    class Exposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            hidden = x @ self.weight
            return hidden, hidden.view(-1, 64) + 1.0, x.relu() + self.weight.neg()

    def loss(outputs: Any, _: Any) -> torch.Tensor:
        return outputs[0].sum() + outputs[1].square().sum() + outputs[2].square().sum()

    torch.manual_seed(0)
    model, x = Exposed().train(), torch.randn(32, 32)
    weight, given = model.weight.detach().clone(), x.clone()
    plan = planned_within(model, (x, None), loss, "none")
    assert differences(model, (x, None), loss, plan) == EQUAL
    assert torch.equal(model.weight, weight)
    assert torch.equal(x, given)


def test_what_is_read_besides_must_be_there_before_the_maker_runs():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return y - self.b(x)  # only y, which is made before the other one, could be written over

    ops = ops_of(Late(), torch.randn(8, 32))
    assert ops[:3] == ["aten.addmm.default", "aten.addmm.default", "aten.sub.Tensor"]


def test_the_peak_of_a_step_that_eager_runs_in_place_is_eagers():
    torch.manual_seed(0)
    layers = [
        layer
        for _ in range(6)
        for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16 * 16, 10)).train()
    batch = (torch.randn(8, 8, 16, 16), torch.randint(0, 10, (8,)))
    plan = planned_within(model, batch, F.cross_entropy, "none")
    assert differences(model, batch, F.cross_entropy, plan) == EQUAL
    eager = left_of(copy.deepcopy(model), batch, F.cross_entropy)
    new_statistics_bytes = sum(b.nbytes for b in model.buffers())  # written when forward ends
    assert plan.predicted_peak_bytes <= eager.peak_bytes + new_statistics_bytes


class Powers(nn.Module):
    """Gradients of powers multiply by numbers; in 16 bits ``mul_`` rounds the number first, ``mul`` does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu().add(0.1).pow(1.7)


class ComplexProducts(nn.Module):
    """Products of complex numbers round by how they are vectorized: in place otherwise than in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary, self.turned = (
            nn.Parameter(torch.randn(*shape)) for shape in ((5, 7), (5, 7), (7, 5))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(self.real, self.imaginary)
        return (
            x.sum()
            + (self.imaginary * z).abs().sum()
            + (z * self.turned.t()).abs().sum()
            + torch.view_as_real(z.exp().mul(self.turned.t())).square().sum()
        )


class Mixed(nn.Module):
    """Sums of tensors of two dtypes, one of which is copied on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return (y.bfloat16() * 2).add_(y).float() + (y + 1).mul(x.double()).float()


@pytest.mark.parametrize("model", [Powers, ComplexProducts, Mixed])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_what_rounds_alike_is_written_over(model: type[nn.Module], autocast: bool):
    torch.manual_seed(0)
    module = model().train()
    width = module.linear.in_features if isinstance(module, Powers | Mixed) else 8  # type: ignore[union-attr]
    batch = (torch.randn(64, width), None)

    def loss(outputs: torch.Tensor, _: Any) -> torch.Tensor:
        return outputs.float().mean()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plan = planned_within(module, batch, loss, "none")
        assert differences(module, batch, loss, plan) == EQUAL


class Normed(nn.Module):
    """Layer norm and what follows in the memory of its first output; backward reads its other two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x).exp())


@pytest.mark.parametrize("keep_result", [True, False])
def test_a_node_that_runs_again_writes_over_its_new_result_alone(keep_result: bool):
    torch.manual_seed(0)
    model, x = Normed().train(), torch.randn(64, 32)
    prepared = prepare(model, (x, None), loss=mean_of)
    problem = prepared.problem
    graph = problem.costed.graph
    at = next(k for k, node in enumerate(graph.nodes) if node.op.endswith(" + aten.exp_.default"))
    result, *statistics = graph.nodes[at].outputs
    # The mean is dropped and made again; with it comes a second result, whether the first is there or not.
    dropped = statistics[:1] if keep_result else [result, *statistics]
    instructions: list[Any] = []
    live: set[int] = set()
    for index, node in enumerate(graph.nodes):
        instructions.append(Compute(index))
        live |= set(node.outputs)
        if index == graph.num_forward - 1:
            instructions += [Free(v) for v in dropped]
            instructions.append(Compute(at))
        over = [v for v in live if not graph.values[v].is_held and max(graph.users[v], default=-1) <= index]
        instructions += [Free(v) for v in over]
        live -= set(over)
    by_hand = Solution(Status.FEASIBLE, Schedule(tuple(instructions)), 0.0, 0.0, 0.0, "by hand")
    plan = prepared.answer(dataclasses.replace(problem, budget_bytes=1 << 30), by_hand)
    assert plan.num_rematerialized == 1
    assert differences(model, (x, None), mean_of, plan) == EQUAL
