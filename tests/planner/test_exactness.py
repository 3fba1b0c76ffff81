"""Equal to eager bit for bit where traces usually are not: recurrent layers, ties, layouts, in-place writes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planner
from planner.graph import Phase
from planner.just_in_time import schedule_of_order
from planner.prepare import prepare
from planner.solution import Solution, Status
from tests.models import BatchNormNet, TinyGPT, token_loss
from tests.planner.steps import EQUAL, differences, left_of, planned_within


def squared(outputs: Any, _: Any) -> torch.Tensor:
    return (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean()


class Tied(nn.Module):
    """One weight under three names, one module under two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.again = self.c
        self.b.weight = self.a.weight
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


class InPlace(nn.Module):
    """Writes into views and into their base, expands, returns a view and its base."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.linear(x) * 1.5
        left, middle, right = y[:, :8], y[:, 8:16], y[:, 16:]
        left.add_(middle).mul_(0.5)
        right[:, ::2] *= 2.0
        y[0].fill_(0.25)
        y.relu_()
        self.calls[1] += 1.0
        return y, y.t()[3:5], left.expand(2, *left.shape)


class Resampled(nn.Module):
    """Every kind of interpolation, and shrinkage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = sum(F.interpolate(y, scale_factor=2, mode=mode) for mode in ("nearest", "bilinear", "bicubic"))
        assert isinstance(z, torch.Tensor)
        return F.hardshrink(z) + F.softshrink(z)


class Recurrent(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = kind(24, 37, 2, dropout=0.1, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, state = self.layer(x)
        return outputs + (state[0] if isinstance(state, tuple) else state).mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tied three times": (Tied, (64, 16)),
    "in place": (InPlace, (32, 8)),
    "interpolation": (Resampled, (2, 3, 12, 12)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 6, 24)),
    "lstm, both directions": (lambda: Recurrent(nn.LSTM, bidirectional=True), (4, 6, 24)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 6, 24)),
    "rnn": (lambda: Recurrent(nn.RNN), (4, 6, 24)),
}


@pytest.mark.parametrize("budget", ["none", "smallest"])
@pytest.mark.parametrize("name", MODELS)
def test_a_planned_step_equals_eager_bit_for_bit(name: str, budget: str):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, batch = make().train(), (torch.randn(shape), None)
    assert differences(model, batch, squared, planned_within(model, batch, squared, budget)) == EQUAL


def test_channels_last_images_and_weights_keep_their_layout():
    torch.manual_seed(0)
    model = BatchNormNet().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 24, 24).to(memory_format=torch.channels_last)
    batch = (images, torch.randint(0, 10, (8,)))
    plan = planned_within(model, batch, F.cross_entropy, "60% of activations")
    assert plan.num_rematerialized > 0
    assert differences(model, batch, F.cross_entropy, plan) == EQUAL


def test_forward_and_gradient_hooks_run_once_a_step():
    torch.manual_seed(0)
    model = TinyGPT(layers=2)
    batch = (torch.randint(0, 64, (4, 24)), torch.randint(0, 64, (4, 24)))
    model.norm.register_forward_hook(lambda module, args, output: output * 1.25)
    plan = planned_within(model, batch, token_loss, "70% of activations")
    seen: list[str] = []
    planned, eager = planner.apply(copy.deepcopy(model), plan), copy.deepcopy(model)
    for module, who in ((planned, "planned"), (eager, "eager")):
        module.get_parameter("head.weight").register_hook(lambda g, who=who: seen.append(who))
        module.register_forward_hook(lambda module, args, output, who=who: seen.append(f"{who} forward"))
    left = [left_of(module, batch, token_loss, steps=1) for module in (planned, eager)]
    assert all(torch.equal(a, b) for a, b in zip(*(one.gradients.values() for one in left), strict=True))  # type: ignore[arg-type]
    assert seen == ["planned forward", "planned", "eager forward", "eager"]


class SavedStatistics(nn.Module):
    """Operations of two and of three outputs, some of which are read in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(32))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        x = x - x.max(-1, keepdim=True)[0]
        for norm in self.norms:
            x = x + norm(x).tanh()
        return x


@pytest.mark.parametrize("again", [(0, 2, 0), (2, 2, 0), (0, 1, 0, 1)])
def test_a_saved_value_is_not_replaced_by_another_one_where_operations_run_three_times(
    again: tuple[int, ...],
):
    # A second rerun takes the name of a value that arrives from forward; that one was renamed to a third's name.
    torch.manual_seed(0)
    model, batch = SavedStatistics(), (torch.randn(64, 32), torch.randn(64, 32))
    prepared = prepare(model, batch, loss=F.mse_loss)
    graph = prepared.problem.costed.graph
    several = [
        k
        for k, node in enumerate(graph.nodes)
        if node.op.startswith(("aten.max.dim", "aten.native_layer_norm.default"))
    ]
    backward = next(k for k, node in enumerate(graph.nodes) if node.phase is Phase.BACKWARD)
    order = [*range(backward), *(several[i] for i in again), *range(backward, len(graph.nodes))]
    by_hand = Solution(Status.FEASIBLE, schedule_of_order(graph, order), 0.0, 0.0, 0.0, "by hand")
    plan = prepared.answer(dataclasses.replace(prepared.problem, budget_bytes=1 << 30), by_hand)
    assert differences(model, batch, F.mse_loss, plan) == EQUAL


class TwoHeads(nn.Module):
    """Two outputs from one trunk; the second one also comes as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.trunk(x).tanh()
        second = self.second(x)
        return {"first": self.first(x), "second": second, "turned": second.t()}


@pytest.mark.parametrize("read", ["first", "second", "turned", "first second"])
@pytest.mark.parametrize("planned_for", ["first", "first second"])
def test_parameters_behind_outputs_that_the_loss_does_not_read_get_no_gradient(read: str, planned_for: str):
    torch.manual_seed(0)
    model, x = TwoHeads().train(), torch.randn(32, 16)

    def loss_of(names: str) -> Any:
        return lambda outputs, _: sum(outputs[name].square().mean() for name in names.split())

    plan = planned_within(model, (x, None), loss_of(planned_for), "none")
    planned, eager = planner.apply(copy.deepcopy(model), plan), copy.deepcopy(model)
    for module in (planned, eager):
        # Two calls before any backward: each knows which of its own outputs were read.
        other = module(x)["first"].sum()
        loss_of(read)(module(x), None).backward()
        for parameter in module.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        behind = module.second.weight.grad
        assert (behind is None) == (read == "first")
        other.backward()
    for (name, a), b in zip(planned.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7), name


def test_a_changed_setting_of_a_layer_is_noticed():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)).train(), torch.randn(4, 8)
    plan = planned_within(model, (x, None), lambda outputs, _: outputs.sum(), "none")
    module = planner.apply(model, plan)
    module(x).sum().backward()
    model[1].p = 0.5
    with pytest.raises(planner.PlanMismatchError, match="another computation"):
        module(x)
