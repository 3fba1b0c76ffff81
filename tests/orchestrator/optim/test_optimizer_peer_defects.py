"""Each known defect of another library's LARS, LAMB, LookAhead or Ranger, as a claim that ours keeps."""

import copy

import pytest
import torch
import torch.distributed.checkpoint.state_dict as checkpoint_state
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS


def lookahead_radam(params, **options):
    return Lookahead(torch.optim.RAdam(params, **options))


MAKERS = pytest.mark.parametrize(
    "make", [LARS, LAMB, Ranger, RangerLARS, lookahead_radam], ids=lambda make: make.__name__
)


def step_along(optimizer, weight, gradient):
    weight.grad = gradient.clone()
    before = weight.detach().clone()
    optimizer.step()
    return weight.detach() - before


def test_ranger_descends_in_its_first_five_steps_too():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Ranger([weight], sync_every=100)
    for _ in range(5):
        moved = step_along(optimizer, weight, torch.tensor([1.0, -1.0]))
        assert moved[0] < 0 < moved[1]


def test_lamb_first_step_is_bias_corrected():
    # t = 1: m^ = g, so u = sign(g) and the step has the length lr ||w|| = 0.1, whatever the betas.
    weight = nn.Parameter(torch.tensor([0.6, 0.8], dtype=torch.float64))
    moved = step_along(LAMB([weight], lr=0.1), weight, torch.tensor([3.0, -5.0], dtype=torch.float64))
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-5)


def test_lamb_does_not_clamp_the_weight_norm_at_ten():
    # ||w|| = 50, lr 0.01: a step of 0.5; clamped it would be 0.1.
    weight = nn.Parameter(torch.tensor([30.0, 40.0], dtype=torch.float64))
    moved = step_along(LAMB([weight], lr=0.01), weight, torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("inner", ["wrapper", "ranger"])
def test_first_synchronization_pulls_back_towards_the_initial_weights(inner):
    # Step 1 with k = 1: the slow weights are w0, not what is found when they are first needed.
    ends = {}
    for slow_step_size in (1.0, 0.5):
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        if inner == "ranger":
            optimizer = Ranger([weight], lr=0.4, sync_every=1, slow_step_size=slow_step_size)
        else:
            sgd = torch.optim.SGD([weight], lr=0.4)
            optimizer = Lookahead(sgd, sync_every=1, slow_step_size=slow_step_size)
        ends[slow_step_size] = step_along(optimizer, weight, torch.ones(1, dtype=torch.float64)).item()
    assert ends[0.5] == pytest.approx(0.5 * ends[1.0])
    assert ends[1.0] == pytest.approx(-0.4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ranger_lars_adapts_to_the_norm_of_the_weights(scale):
    # The step is lr ||w||: the layer's own norm, not that of w - update.
    torch.manual_seed(0)
    weight = nn.Parameter(scale * torch.randn(5, 5, dtype=torch.float64))
    norm = weight.detach().norm()
    moved = step_along(RangerLARS([weight], lr=0.01), weight, torch.randn(5, 5, dtype=torch.float64))
    assert (moved.norm() / norm).item() == pytest.approx(0.01, rel=1e-9)


@MAKERS
def test_gradients_keep_value_and_identity_for_logging_and_noise_scale(make):
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = make([weight], lr=0.1, weight_decay=0.1)
    gradient = torch.arange(9.0).reshape(3, 3)
    weight.grad = gradient
    for _ in range(7):
        optimizer.step()
    assert weight.grad is gradient
    assert torch.equal(gradient, torch.arange(9.0).reshape(3, 3))


@MAKERS
def test_distributed_checkpoint_resume_is_bit_exact(make):
    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return model, make(model.parameters(), lr=0.05)

    def train(model, optimizer, num_steps):
        for _ in range(num_steps):
            optimizer.zero_grad()
            (model(torch.ones(2, 3)) - 1).square().sum().backward()
            optimizer.step()

    straight, straight_optimizer = model_and_optimizer()
    train(straight, straight_optimizer, 4)
    saved = copy.deepcopy(checkpoint_state.get_state_dict(straight, straight_optimizer))
    train(straight, straight_optimizer, 11)

    resumed, resumed_optimizer = model_and_optimizer()
    checkpoint_state.set_state_dict(
        resumed, resumed_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1]
    )
    train(resumed, resumed_optimizer, 11)

    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
