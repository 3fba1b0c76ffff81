"""Rates that are tensors, gradients that are not finite, numbers of other kinds than float32."""

import copy

import pytest
import torch
from small_training import assert_same_parameters, over_all, over_own, small_model, train
from torch import nn

from orchestrator.optim import LAMB, Lookahead, Ranger, RangerLARS, slow_weights

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "fused", "foreach"])


@IMPLEMENTATIONS
@over_own
def test_a_rate_that_is_a_tensor_steps_as_the_number_does_and_follows_a_schedule(make, implementation):
    ends = []
    for lr in (0.1, torch.tensor(0.1)):
        model = small_model()
        optimizer = make(model.parameters(), lr=lr, weight_decay=0.1, implementation=implementation)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        train(model, optimizer, range(9), schedule)
        ends.append(model)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    for a, b in zip(ends[0].parameters(), ends[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # a float32 rate has 24 bits


@over_own
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(make, value):
    model = small_model()
    optimizer = make(model.parameters(), nonfinite="skip")
    train(model, optimizer, range(4))
    before = copy.deepcopy((model, optimizer.state_dict()["state"]))
    model[0].weight.grad[1, 1] = value
    optimizer.step()
    assert_same_parameters(model, before[0])
    for left, right in zip(optimizer.state_dict()["state"].values(), before[1].values()):
        assert all(torch.equal(a, right[k]) if torch.is_tensor(a) else a == right[k] for k, a in left.items())
    assert optimizer.skipped_steps == 1
    resumed = make(small_model().parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.skipped_steps == 1


def test_lookahead_does_not_count_a_step_that_was_skipped():
    weight = nn.Parameter(torch.ones(3))
    optimizer = Lookahead(LAMB([weight], nonfinite="skip"), sync_every=2)
    weight.grad = torch.full((3,), float("nan"))
    optimizer.step()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["lookahead_step"] == 1
    assert torch.isfinite(optimizer.state[weight]["slow"]).all()


@over_own
def test_a_gradient_that_is_not_finite_raises_before_anything_moves(make):
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([first, second], nonfinite="raise")
    first.grad, second.grad = torch.ones(2, 2), torch.full((2, 2), float("inf"))
    with pytest.raises(FloatingPointError, match="infinity or NaN"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2, 2))
    assert not optimizer.state


@over_own
def test_a_complex_layer_steps_as_its_real_and_imaginary_parts_do(make):
    if "centralized" in make.__name__:
        pytest.skip("the mean of a row is taken over complex numbers, not over parts")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 4, 2, generator=generator)
    whole = nn.Parameter(torch.view_as_complex(start.clone()))
    parts = nn.Parameter(start.clone())
    optimizers = [
        make([whole], weight_decay=0.1),
        make([parts], weight_decay=0.1, implementation="reference"),
    ]
    for _ in range(8):
        gradient = torch.randn(5, 4, 2, generator=generator)
        whole.grad, parts.grad = torch.view_as_complex(gradient), gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach())


@over_all
def test_a_half_precision_run_resumes_bit_exactly(make):
    def model_and_optimizer():
        model = small_model().to(torch.bfloat16)
        return model, make(model.parameters())

    def steps(model, optimizer, which):
        for step in which:
            for parameter in model.parameters():
                generator = torch.Generator().manual_seed(step)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            optimizer.step()

    straight, stopped, resumed = (model_and_optimizer() for _ in range(3))
    steps(*straight, range(15))
    steps(*stopped, range(9))
    resumed[0].load_state_dict(stopped[0].state_dict())
    resumed[1].load_state_dict(stopped[1].state_dict())
    steps(*resumed, range(9, 15))
    assert_same_parameters(straight[0], resumed[0])


@pytest.mark.parametrize("make", [Ranger, RangerLARS])
def test_evaluating_the_slow_weights_leaves_a_half_precision_run_as_it_was(make):
    weight = nn.Parameter(torch.linspace(0, 1, 12).to(torch.bfloat16))
    optimizer = make([weight], lr=0.1)
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = weight.detach().clone(), optimizer.state[weight]["slow"].clone()
    with slow_weights(optimizer):
        assert torch.equal(weight, before[1].to(torch.bfloat16))
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.state[weight]["slow"], before[1])


@IMPLEMENTATIONS
def test_weights_that_are_views_with_gaps_move_and_leave_what_is_between(implementation):
    whole = torch.ones(6, 8)
    weight = nn.Parameter(whole[:, ::2])
    optimizer = LAMB([weight], lr=0.1, implementation=implementation)
    weight.grad = torch.ones(6, 4)
    optimizer.step()
    assert (whole[:, ::2] < 1).all()
    assert (whole[:, 1::2] == 1).all()


@IMPLEMENTATIONS
def test_a_rate_of_shape_one_and_a_parameter_without_memory_of_its_own_step_as_others_do(implementation):
    from torch.testing._internal.two_tensor import TwoTensor

    ends = []
    for lr, wrap in ((0.1, False), (torch.tensor([0.1]), False), (0.1, True)):
        weights = [
            nn.Parameter(TwoTensor(torch.ones(4, 3), torch.ones(4, 3)) if wrap else torch.ones(4, 3))
            for _ in range(2)
        ]
        optimizer = LAMB(weights, lr=lr, weight_decay=0.1, implementation=implementation)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        ends.append(weights[1].a if wrap else weights[1].detach())
    for end in ends[1:]:
        torch.testing.assert_close(end.detach(), ends[0], rtol=1e-6, atol=0)
