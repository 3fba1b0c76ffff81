"""Every optimizer under test by a short name, and a small model to train with it."""

import pytest
import torch
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS


def lookahead_sgd(params, lr=0.1, **options):
    return Lookahead(torch.optim.SGD(params, lr=lr, momentum=0.9, **options))


def lookahead_adamw(params, lr=0.1, **options):
    return Lookahead(torch.optim.AdamW(params, lr=lr, **options))


def ranger_centralized(params, lr=0.1, **options):
    return Ranger(params, lr=lr, gradient_centralization=True, **options)


def ranger_lars_before_rectify(params, lr=0.1, **options):
    return RangerLARS(params, lr=lr, trust="before_rectify", **options)


def lars(params, lr=0.1, **options):
    return LARS(params, lr=lr, trust_coefficient=0.5, **options)


def lars_nesterov(params, lr=0.1, **options):
    return LARS(params, lr=lr, nesterov=True, trust_coefficient=0.5, **options)


def lars_without_momentum(params, lr=0.1, **options):
    return LARS(params, lr=lr, momentum=0.0, trust_coefficient=5.0, **options)


OWN = [
    lars,
    lars_nesterov,
    lars_without_momentum,
    LAMB,
    Ranger,
    ranger_centralized,
    RangerLARS,
    ranger_lars_before_rectify,
]
ALL = [*OWN, lookahead_sgd, lookahead_adamw]
over_all = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
over_own = pytest.mark.parametrize("make", OWN, ids=lambda make: make.__name__)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))


def train(model, optimizer, steps, schedule=None):
    """Steps `steps` (a range) on batches that depend on the step number only; the losses."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :2].cumsum(1)).square().mean()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def assert_same_parameters(left, right):
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)
