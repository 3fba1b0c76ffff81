"""Norms of single examples' gradients: in closed form, by torch.func, and one backward at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.batch_size.coupled_examples import frozen_statistics
from orchestrator.batch_size.layer_formulas import UnsupportedLayerError
from orchestrator.batch_size.per_example import per_example
from planner.step import StepModule
from tests.models import BatchNormNet, TinyGPT, token_loss

EXAMPLES = 6


class Sequences(nn.Module):
    """1-dim convolution and RMS norm over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.RMSNorm(8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).transpose(1, 2)).relu().mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, (3, 1), groups=4, bias=False),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def tokens(*, tied: bool) -> tuple[nn.Module, Tensor, Tensor]:
    text = torch.randint(64, (EXAMPLES, 9))
    return StepModule(TinyGPT(width=8, layers=2, tied=tied), token_loss), text, text.roll(-1, 1)


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(2, (EXAMPLES,))
    match name:
        case "perceptron":
            return StepModule(perceptron(), F.cross_entropy), torch.randn(EXAMPLES, 5), labels
        case "images":
            x = torch.randn(EXAMPLES, 3, 12, 12)
            model = images()
            model(x)
            return StepModule(model, F.cross_entropy), x, labels
        case "sequences":
            return StepModule(Sequences(), F.cross_entropy), torch.randn(EXAMPLES, 3, 10), labels
        case _:
            return tokens(tied=name == "tied gpt")


def one_by_one(step: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of each example's gradient, and of their mean."""
    parameters = [p for p in step.parameters() if p.requires_grad]
    gradients = [
        torch.cat(
            [
                gradient.flatten()
                for gradient in torch.autograd.grad(step(inputs[i : i + 1], targets[i : i + 1]), parameters)
            ]
        ).double()
        for i in range(len(inputs))
    ]
    return torch.stack([g.square().sum() for g in gradients]), torch.stack(gradients).mean(0).square().sum()


@pytest.mark.parametrize("method", ["closed_form", "torch_func"])
@pytest.mark.parametrize("name", ["perceptron", "images", "sequences", "gpt", "tied gpt"])
def test_norms_are_those_of_one_backward_an_example(name: str, method: Any):
    step, inputs, targets = case(name)
    found = per_example(step, inputs, targets, method=method, chunk=4)
    squares, mean = one_by_one(step, inputs, targets)
    assert found.method == method
    # Sums in float32 in another order.
    torch.testing.assert_close(found.sqnorms.sum(1), squares, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mean_by_group.sum(), mean, rtol=1e-4, atol=0)
    norms = found.norms()
    assert float(norms.small_sqnorm) == pytest.approx(float(squares.mean()), rel=1e-4)


def test_frozen_parameters_do_not_count_and_groups_add_up():
    step, inputs, targets = case("perceptron")
    first, last = step.model[0], step.model[3]
    first.weight.requires_grad_(False)
    groups = [[first.weight, first.bias], list(last.parameters())]
    for method in ("closed_form", "torch_func"):
        found = per_example(step, inputs, targets, method=method, groups=groups)
        assert found.sqnorms.shape == (EXAMPLES, 3)  # the layer norm is in neither group
        torch.testing.assert_close(
            found.sqnorms.sum(1), one_by_one(step, inputs, targets)[0], rtol=1e-4, atol=0
        )
        alone = per_example(StepModule(step.model, F.cross_entropy), inputs, targets, groups=[[first.bias]])
        torch.testing.assert_close(found.sqnorms[:, 0], alone.sqnorms[:, 0], rtol=1e-5, atol=0)


def test_the_gradients_of_training_stay_as_they_are():
    step, inputs, targets = case("gpt")
    step(inputs, targets).backward()
    before = [p.grad.clone() for p in step.parameters() if p.grad is not None]
    for method in ("closed_form", "torch_func"):
        per_example(step, inputs, targets, method=method)
    after = [p.grad for p in step.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Positions(nn.Module):
    """Adds a parameter that has no dim of the batch, in two ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(9, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "positions":
            return self.last((x[:, None] + self.embed(torch.arange(9))).mean(1))
        return self.last(x * self.scale)


@pytest.mark.parametrize(
    ("way", "reason"), [("positions", "without the batch of 6 as its dim 0"), ("scale", "mul of a parameter")]
)
def test_what_has_no_closed_form_is_refused_with_its_name_and_measured_by_torch_func(way: str, reason: str):
    step = StepModule(Positions(way), F.cross_entropy)
    inputs, targets = torch.randn(EXAMPLES, 5), torch.randint(2, (EXAMPLES,))
    for name, parameter in step.model.named_parameters():
        parameter.requires_grad_(
            way in ("positions", "scale") and (way == "positions" or "embed" not in name)
        )
    if way == "positions":
        step.model.scale.requires_grad_(False)
    with pytest.raises(UnsupportedLayerError, match=reason):
        per_example(step, inputs, targets, method="closed_form")
    found = per_example(step, inputs, targets)
    assert found.method == "torch_func"
    assert reason in found.reason
    torch.testing.assert_close(found.sqnorms.sum(1), one_by_one(step, inputs, targets)[0], rtol=1e-4, atol=0)


def test_batch_norm_is_refused_and_measured_with_frozen_statistics():
    torch.manual_seed(0)
    step = StepModule(BatchNormNet(), F.cross_entropy)
    step.model.drop.p = 0.0
    inputs, targets = torch.randn(EXAMPLES, 3, 8, 8), torch.randint(10, (EXAMPLES,))
    with pytest.raises(ValueError, match=r"batch norm \(model.stem.1 and 4 more\) couples the examples"):
        per_example(step, inputs, targets)
    step(inputs, targets)  # makes statistics
    before = {name: buffer.clone() for name, buffer in step.named_buffers()}
    with frozen_statistics(step):
        closed = per_example(step, inputs, targets, method="closed_form")
        torch.testing.assert_close(
            closed.sqnorms.sum(1), one_by_one(step, inputs, targets)[0], rtol=1e-4, atol=0
        )
    assert all(torch.equal(buffer, before[name]) for name, buffer in step.named_buffers())
    assert step.model.stem[1].training


def test_batch_norm_without_statistics_cannot_be_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="'1' keeps no running statistics"), frozen_statistics(model):
        pass


def test_one_example_is_refused():
    step, inputs, targets = case("perceptron")
    with pytest.raises(ValueError, match="at least 2 examples"):
        per_example(step, inputs[:1], targets[:1])
