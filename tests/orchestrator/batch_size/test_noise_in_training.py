"""The noise scale of a run: what it is right under, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.batch_size.micro_batch_noise import MicroBatchNoise
from orchestrator.data import BatchLayout
from orchestrator.noise_measurement import NoiseMeasurement


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def data(step: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, 6, generator=generator)
    return inputs, inputs.sum(1, keepdim=True) + torch.randn(size, 1, generator=generator)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (model(inputs) - targets).square().mean()


def train(
    model: nn.Module, *, steps: int, scale: float = 1.0, clip: float | None = None, **options: Any
) -> list[Any]:
    """Norms of the steps of a run of 4 micro-batches of 4; its weights stay, so that runs can be compared."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, **options)
    noise = MicroBatchNoise(model.parameters())
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for inputs, targets in zip(*(part.split(4) for part in data(step, 16))):
            (loss_of(model, inputs, targets) / 4 * scale).backward()
        norms = noise.observation(num_micro_batches=4, loss_factor=scale / 4)
        found.append((float(norms.small_sqnorm), float(norms.big_sqnorm)))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return found


@pytest.mark.parametrize(
    "options", [{"scale": 65536.0}, {"scale": 2.0**-10}, {"clip": 1e-3}, {"weight_decay": 10.0}], ids=str
)
def test_loss_scale_clipping_and_weight_decay_do_not_enter(options: Any):
    # Powers of two scale every number exactly.
    assert train(net(), steps=3, **options) == train(net(), steps=3)


def test_16_bit_gradients_are_summed_in_float32():
    # 2^17 gradients of 2^-12: a sum of squares in bfloat16 or float16 stays at 2^-16 or is 0.
    for dtype in (torch.bfloat16, torch.float16):
        weight = nn.Parameter(torch.zeros(2**17, dtype=dtype))
        noise = MicroBatchNoise([weight])
        (weight * torch.tensor(2.0**-12, dtype=dtype)).sum().backward()
        norms = noise.observation(num_micro_batches=1, loss_factor=1.0)
        assert float(norms.small_sqnorm) == pytest.approx(2.0**-7, rel=1e-5)
        assert float(norms.big_sqnorm) == pytest.approx(2.0**-7, rel=1e-5)


def test_the_first_gradient_becomes_grad_without_a_copy():
    # Autograd takes a gradient over as .grad only if nobody else holds it: a hook that kept one would cost a copy.
    weight = nn.Parameter(torch.ones(1000))
    pointers = []
    noise = MicroBatchNoise([weight])
    weight.register_hook(lambda gradient: pointers.append(gradient.data_ptr()))
    (weight * torch.arange(1000.0)).sum().backward()
    assert weight.grad is not None
    assert pointers == [weight.grad.data_ptr()]
    noise.close()


def test_a_step_of_more_backward_calls_than_it_was_told_is_refused():
    model = net()
    noise = MicroBatchNoise(model.parameters())
    for step in range(3):
        loss_of(model, *data(step, 4)).backward()
    with pytest.raises(RuntimeError, match=r"of 3 backward calls .* of 2 micro-batches"):
        noise.observation(num_micro_batches=2, loss_factor=0.5)


def measured(model: nn.Module, layout: BatchLayout, steps: range, noise: NoiseMeasurement) -> None:
    for step in steps:
        model.zero_grad()
        for inputs, targets in zip(
            *(part.split(layout.micro_batch) for part in data(step, layout.global_batch))
        ):
            (loss_of(model, inputs, targets) / layout.accumulation).backward()
        noise.observe([noise.local_norms()])


def test_a_run_continued_from_its_checkpoint_has_the_estimates_of_the_undisturbed_one_bit_for_bit():
    layout = BatchLayout(4, 4, 1)
    straight_model, model = net(), net()
    groups = [list(m[0].parameters()) for m in (straight_model, model)]
    straight = NoiseMeasurement(straight_model, layout, groups=[groups[0]])
    measured(straight_model, layout, range(60), straight)
    first = NoiseMeasurement(model, layout, groups=[groups[1]])
    measured(model, layout, range(25), first)
    resumed_model = net()
    resumed = NoiseMeasurement(resumed_model, layout, groups=[list(resumed_model[0].parameters())])
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    measured(resumed_model, layout, range(25, 60), resumed)
    assert resumed.estimate() == straight.estimate()
    assert resumed.by_group() == straight.by_group()
    assert resumed.estimate().num_observations == 60
    assert math.isfinite(resumed.estimate().value)


def test_an_estimate_goes_on_with_another_number_of_micro_batches():
    model = net()
    truth = NoiseMeasurement(model, layout := BatchLayout(4, 16, 1))
    measured(model, layout, range(1000, 1150), truth)
    few_model = net()
    few = NoiseMeasurement(few_model, layout := BatchLayout(8, 2, 1))
    measured(few_model, layout, range(60), few)
    many_model = net()
    many = NoiseMeasurement(many_model, layout := BatchLayout(4, 8, 1))
    many.load_state_dict(few.state_dict())
    measured(many_model, layout, range(60, 120), many)
    low, high = many.estimate().interval
    assert many.estimate().num_observations == 120
    assert low <= truth.estimate().value <= high


def test_other_groups_than_the_checkpoint_has_are_refused():
    model = net()
    noise = NoiseMeasurement(model, BatchLayout(4, 4, 1), groups=[list(model.parameters())])
    with pytest.raises(ValueError, match="of the whole and of 0 groups"):
        NoiseMeasurement(net(), BatchLayout(4, 4, 1)).load_state_dict(noise.state_dict())


def test_groups_add_up_to_the_whole():
    model = net()
    groups = [list(model[0].parameters()), list(model[2].parameters())]
    noise = NoiseMeasurement(model, layout := BatchLayout(4, 4, 1), groups=groups)
    measured(model, layout, range(40), noise)
    whole, parts = noise.estimate(), noise.by_group()
    assert sum(part.g2 for part in parts) == pytest.approx(whole.g2)
    assert sum(part.tr_s for part in parts) == pytest.approx(whole.tr_s)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: model[2].weight.data.mul_(math.nan), "the gradient is not finite"),
        (lambda model: [p.data.zero_() for p in model.parameters()], None),
    ],
)
def test_a_run_that_breaks_gets_a_sentence_within_20_steps(spoil: Any, reason: str | None):
    model, layout = net(), BatchLayout(4, 4, 1)
    noise = NoiseMeasurement(model, layout)
    measured(model, layout, range(100), noise)
    assert noise.estimate().reliable
    spoil(model)
    if reason is None:  # a model whose loss has no slope
        reason = "the gradient is 0"
        for step in range(20):
            model.zero_grad()
            for inputs, _ in zip(*(part.split(4) for part in data(step, 16))):
                (model(inputs) * 0).sum().backward()
            noise.observe([noise.local_norms()])
    else:
        measured(model, layout, range(20), noise)
    estimate = noise.estimate()
    assert not estimate.reliable
    assert math.isnan(estimate.value)
    assert estimate.reason == "the last 20 steps said nothing: " + estimate.reason.partition(": ")[2]
    assert reason in estimate.reason


def test_batch_norm_is_refused_with_the_sentence_that_says_why_and_frozen_it_is_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    layout = BatchLayout(4, 4, 1)
    refused = NoiseMeasurement(model, layout)
    measured(model, layout, range(40), refused)
    estimate = refused.estimate()
    assert math.isnan(estimate.value)
    assert not estimate.reliable
    assert estimate.reason.startswith("batch norm (1) couples the examples of a micro-batch")
    assert "couples the examples" in refused.advice().reason
    model[1].eval()
    frozen = NoiseMeasurement(model, layout)
    measured(model, layout, range(40), frozen)
    assert frozen.estimate().value > 0
