"""What every optimizer here owes to torch.optim.Optimizer: laws tested over all of them."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from small_training import assert_same_parameters, lars, lars_nesterov, over_all, over_own, small_model, train
from torch import nn

from orchestrator.optim import RangerLARS


@over_all
@pytest.mark.parametrize("num_steps_before", [1, 6, 9])  # within, at the end of, in the middle of a cycle
def test_resume_from_disk_is_bit_exact(make, num_steps_before):
    straight, stopped = small_model(), small_model()
    straight_optimizer, stopped_optimizer = make(straight.parameters()), make(stopped.parameters())
    train(straight, straight_optimizer, range(15))
    train(stopped, stopped_optimizer, range(num_steps_before))

    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": stopped_optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
    resumed_optimizer = make(resumed.parameters(), lr=0.77)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, resumed_optimizer, range(num_steps_before, 15))

    assert_same_parameters(straight, resumed)


@over_all
def test_state_holds_tensors_and_numbers_only(make):
    model = small_model()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    for state in optimizer.state_dict()["state"].values():
        assert all(type(value) in (torch.Tensor, int, float) for value in state.values())


@over_all
def test_gradients_are_not_changed(make):
    model: Any = small_model()
    optimizer = make(model.parameters(), weight_decay=0.1)
    for _ in range(7):
        model(torch.randn(3, 4)).square().sum().backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@over_all
def test_loss_falls_to_a_third(make):
    model = small_model()
    losses = train(model, make(model.parameters(), lr=0.05), range(150))
    assert sum(losses[-10:]) / 10 < losses[0] / 3


@over_all
def test_maximize_is_descent_of_the_negated_loss(make):
    up, down = small_model(), small_model()
    ascent, descent = (
        make(up.parameters(), maximize=True, weight_decay=0.1),
        make(down.parameters(), weight_decay=0.1),
    )
    for _ in range(8):
        x = torch.ones(2, 4)
        for model, optimizer, sign in ((up, ascent, -1.0), (down, descent, 1.0)):
            optimizer.zero_grad()
            (sign * (model(x) - 1).square().mean()).backward()
            optimizer.step()
    for a, b in zip(up.parameters(), down.parameters(), strict=True):
        # m <- b1 m - (1 - b1) g rounds unlike a lerp.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@over_all
def test_closure_gives_the_same_steps_and_its_loss(make):
    with_closure, without = small_model(), small_model()
    closing, plain = make(with_closure.parameters()), make(without.parameters())
    x = torch.ones(2, 4)
    for _ in range(8):

        def closure():
            closing.zero_grad()
            loss = (with_closure(x) - 1).square().mean()
            loss.backward()
            return loss

        closing.zero_grad(set_to_none=True)  # the first gradients exist only once the closure has run
        returned = closing.step(closure)
        plain.zero_grad()
        loss = (without(x) - 1).square().mean()
        loss.backward()
        plain.step()
        assert returned.item() == loss.item()
    assert_same_parameters(with_closure, without)


@over_all
def test_parameters_without_gradient_are_skipped(make):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make([used, unused], weight_decay=0.1)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))
    assert not optimizer.state.get(unused)


@over_all
def test_groups_have_their_own_rates_and_can_be_added_later(make):
    first, later = nn.Parameter(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])), nn.Parameter(torch.ones(2, 2))
    optimizer = make([first])
    first.square().sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [later], "lr": 0.0})
    for _ in range(12):
        optimizer.zero_grad()
        (first.square().sum() + later.square().sum()).backward()
        optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert torch.equal(later, torch.ones(2, 2))
    assert first.abs().max() < 1


@over_all
def test_schedulers_act_as_a_rate_set_by_hand(make):
    scheduled, by_hand = small_model(), small_model()
    optimizer = make(scheduled.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    train(scheduled, optimizer, range(8), schedule)
    manual = make(by_hand.parameters(), lr=0.2)
    for step in range(8):
        manual.param_groups[0]["lr"] = 0.2 * 0.5 ** (step // 2)
        train(by_hand, manual, range(step, step + 1))
    assert optimizer.param_groups[0]["lr"] == 0.0125
    assert_same_parameters(scheduled, by_hand)


@over_all
def test_copies_and_pickles_continue_alike(make):
    model = small_model()
    optimizer = make(model.parameters())
    train(model, optimizer, range(4))
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, range(4, 15))
    train(copied_model, copied, range(4, 15))
    train(pickled_model, pickled, range(4, 15))
    assert_same_parameters(model, copied_model)
    assert_same_parameters(model, pickled_model)


@over_all
def test_step_hooks_and_repr_work(make):
    model = small_model()
    optimizer = make(model.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["after", "after"]
    assert "lr" in repr(optimizer)


@over_all
def test_steps_without_data_and_has_its_true_state_bytes(make):
    # On the meta device tensors have no values: reading one (.item(), a branch, a copy to the host) raises.
    def state_bytes(device):
        model = nn.Linear(64, 32, device=device)
        optimizer = make(model.parameters(), weight_decay=0.1)
        for _ in range(7):
            model(torch.ones(2, 64, device=device)).sum().backward()
            optimizer.step()
        return sum(
            value.untyped_storage().nbytes()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.ndim
        )

    assert state_bytes("meta") == state_bytes("cpu")


def test_ranger_lars_state_is_two_moments_and_the_slow_weights():
    model = nn.Linear(64, 32)
    optimizer = RangerLARS(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq", "slow"}


@over_own
@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_a_norm_of_zero_gives_no_nan(make, zero):
    weight = nn.Parameter(torch.zeros(3, 2) if zero in ("weight", "both") else torch.ones(3, 2))
    optimizer = make([weight], weight_decay=0.1)
    weight.grad = torch.zeros(3, 2) if zero in ("gradient", "both") else torch.ones(3, 2)
    optimizer.step()
    assert torch.isfinite(weight).all()
    if zero == "weight":
        assert (weight < 0).all() == ("centralized" not in make.__name__)
    if zero == "both":
        assert torch.equal(weight, torch.zeros(3, 2))


@pytest.mark.parametrize("make", [lars, lars_nesterov], ids=lambda make: make.__name__)
def test_norms_beyond_the_range_of_a_half_precision_layer_are_right(make):
    # ||g|| = 512 * 300 = 153600 > 65504, the largest float16; ||w|| = 512; ratio = 0.5 / 300; step 0.1 * 0.5.
    weight = nn.Parameter(torch.ones(512, 512, dtype=torch.float16))
    optimizer = make([weight], lr=0.1)
    weight.grad = torch.full_like(weight, 300.0)
    optimizer.step()
    momentum = 1.9 if make is lars_nesterov else 1.0
    torch.testing.assert_close(
        weight.detach(), torch.full_like(weight, 1 - 0.05 * momentum), rtol=2e-3, atol=0
    )


@over_own
def test_bfloat16_layers_follow_float32_ones(make):
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(8, 8, dtype=dtype))
        optimizer = make([weight], lr=0.05)
        for step in range(1, 4):
            weight.grad = torch.linspace(-1, 1, 64).reshape(8, 8).to(dtype) / step
            optimizer.step()
        state = optimizer.state[weight].values()
        assert all(v.dtype == torch.float32 for v in state if isinstance(v, torch.Tensor))
        ends.append(weight.detach().float())
    # bfloat16 has 8 bits: three steps round by at most half of 2^-7 each, around 1.
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0.02)


@over_own
@pytest.mark.parametrize("implementation", ["fused", "foreach", "reference"])
def test_a_backward_that_saved_the_weights_is_refused_after_a_step(make, implementation):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = make([weight], implementation=implementation)
    loss = weight.square().sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@over_all
@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_a_step_within_torch_compile_runs_as_it_does_outside(make):
    eager, compiled = small_model(), small_model()
    optimizer, other = make(eager.parameters()), make(compiled.parameters())
    train(eager, optimizer, range(10))
    other.step = torch.compile(other.step, backend="eager")
    train(compiled, other, range(10))
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        # not equal: torch's own AdamW, within LookAhead, is compiled and rounds anew
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
