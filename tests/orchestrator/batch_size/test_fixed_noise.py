"""The noise scale at fixed weights, on a regression whose truth is known."""

import time

import pytest
import torch
from torch import nn

from orchestrator.batch_size.fixed_noise import measure_noise
from planner.inputs.strict import WorkloadError

NUM_SAMPLES = 400


def regression(*, noise=1.0, layers=()):
    """A linear model, its loss of some samples, and tr(Sigma) / |G|^2 over all of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_SAMPLES, 6, generator=generator, dtype=torch.float64)
    targets = inputs @ torch.ones(6, 1, dtype=torch.float64)
    targets = targets + noise * torch.randn(NUM_SAMPLES, 1, generator=generator, dtype=torch.float64)
    model = nn.Sequential(*layers, nn.Linear(6, 1, bias=False)).double()
    nn.init.zeros_(model[-1].weight)

    def loss_of(indices):
        return (model(inputs[indices]) - targets[indices]).square().mean()

    gradients = -2 * targets * inputs  # of each sample at weights of 0
    mean = gradients.mean(0)
    return model, loss_of, float(((gradients - mean).square().sum(1).mean()) / mean.square().sum())


def measured(model, loss_of, seed=0, **settings):
    settings = {"num_samples": NUM_SAMPLES, "micro_batch": 4, **settings}
    return measure_noise(model, loss_of, generator=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("noise", [0.5, 5.0])
def test_the_interval_holds_the_exact_noise_scale(noise):
    model, loss_of, exact = regression(noise=noise)
    found = [measured(model, loss_of, seed) for seed in range(8)]
    assert all(one.reliable for one in found)
    # At nominal 95 % three of eight miss with a chance of 0.6 %.
    assert sum(one.interval[0] <= exact <= one.interval[1] for one in found) >= 6


def test_examples_that_may_be_spent_are_not_exceeded():
    model, loss_of, _ = regression()
    seen = []
    measured(model, lambda indices: (seen.append(len(indices)), loss_of(indices))[1], num_examples=2000)
    assert 1000 < sum(seen) <= 2000


def test_a_deadline_is_kept_and_too_little_time_is_said():
    model, loss_of, _ = regression()
    found = measured(model, loss_of, deadline_s=time.monotonic())
    assert not found.reliable
    assert "10 are needed" in found.reason


def test_weights_generator_and_gradients_are_left_as_they_were():
    model, loss_of, _ = regression(layers=(nn.Dropout(0.5),))
    torch.manual_seed(3)
    weights, state = model[-1].weight.clone(), torch.get_rng_state()
    measured(model, loss_of, num_examples=400)
    assert torch.equal(model[-1].weight, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[-1].weight.grad is None


def test_batch_norm_is_measured_with_frozen_statistics_or_refused():
    norm = nn.BatchNorm1d(6)
    model, loss_of, _ = regression(layers=(norm,))
    with pytest.raises(WorkloadError, match="couples the examples of a batch"):
        measured(model, loss_of)
    loss_of(torch.arange(NUM_SAMPLES))  # a step takes statistics
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    assert measured(model, loss_of, num_examples=800).num_observations >= 10
    assert torch.equal(norm.running_mean, before)
    assert norm.training


def test_a_gradient_of_zero_is_no_noise_scale():
    model, _, _ = regression()
    found = measured(model, lambda indices: model[-1].weight.sum() * 0, num_examples=400)
    assert not found.reliable
    assert "the gradient is 0" in found.reason
