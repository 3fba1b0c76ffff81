"""LookAhead: what wrapping another optimizer, and having slow weights, must not break."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from small_training import assert_same_parameters, lookahead_sgd, small_model, train
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS, slow_weights

WITH_SLOW_WEIGHTS = pytest.mark.parametrize(
    "make", [Ranger, RangerLARS, lookahead_sgd], ids=lambda make: make.__name__
)


@WITH_SLOW_WEIGHTS
def test_slow_weights_are_swapped_in_for_evaluation_and_out_again(make):
    model = small_model()
    first = copy.deepcopy(model)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    fast = copy.deepcopy(model)
    with slow_weights(optimizer):
        assert_same_parameters(model, first)  # before the first synchronization: w0
    assert_same_parameters(model, fast)


def test_lookahead_shares_groups_and_state_after_loading():
    model = small_model()
    optimizer = lookahead_sgd(model.parameters())
    train(model, optimizer, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state


def test_lookahead_takes_over_a_checkpoint_of_the_bare_optimizer():
    bare_model = small_model()
    bare = torch.optim.SGD(bare_model.parameters(), lr=0.1, momentum=0.9)
    train(bare_model, bare, range(3))
    model = copy.deepcopy(bare_model)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sync_every=4)
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    train(bare_model, bare, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert_same_parameters(model, bare_model)  # three steps: the cycle of four began at the loaded weights
    assert optimizer.param_groups[0]["sync_every"] == 4


def test_lookahead_around_lookahead_is_refused():
    with pytest.raises(ValueError, match="Ranger has slow weights already"):
        Lookahead(Ranger([nn.Parameter(torch.ones(2))]))


def test_lookahead_wraps_an_optimizer_that_evaluates_its_closure_many_times():
    w = nn.Parameter(torch.tensor([5.0]))
    optimizer: Any = Lookahead(torch.optim.LBFGS([w], max_iter=4), sync_every=1, slow_step_size=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (w - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    # L-BFGS reaches 1 from 5; the slow weights go half of the way from 5, where the step began.
    assert w.item() == pytest.approx(3.0, abs=1e-5)


def steps_of(implementation, make, num_steps, shapes):
    """Weights, slow weights and implementations used, after steps along gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    # Tensors that a list could trip over: gaps, and one that gets its first gradient in the middle of a cycle.
    weights.append(nn.Parameter(torch.randn(6, 8, generator=generator)[:, ::2]))
    weights.append(nn.Parameter(torch.randn(5, generator=generator)))
    optimizer: Any = Lookahead(make(weights), sync_every=4, implementation=implementation)
    used: Counter[str] = Counter()
    for step in range(num_steps):
        for index, weight in enumerate(weights):
            is_late = index == len(weights) - 1 and step < 10
            weight.grad = None if is_late else torch.randn(weight.shape, generator=generator)
        optimizer.step()
        used += optimizer.last_step
    return [w.detach() for w in weights] + [optimizer.state[w]["slow"] for w in weights], used


MAKERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "lars": lambda weights: LARS(weights, lr=0.1, trust_coefficient=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_foreach_equals_the_reference_over_100_steps_on_random_shapes(name):
    random = torch.Generator().manual_seed(len(name))
    shapes = [torch.randint(1, 9, (dims,), generator=random).tolist() for dims in (0, 1, 1, 2, 2, 3, 4)]
    expected, by_reference = steps_of("reference", MAKERS[name], 100, shapes)
    found, by_lists = steps_of("foreach", MAKERS[name], 100, shapes)
    # 25 synchronizations of eight tensors; the late one has 90 steps of its own.
    assert by_reference == {"reference": 25 * 8 + 22}
    assert by_lists == {"foreach": 25 * 8 + 22}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def test_foreach_leaves_16_bits_and_complex_numbers_to_the_reference():
    weights = [
        nn.Parameter(torch.ones(3, dtype=kind)) for kind in (torch.bfloat16, torch.complex64, torch.float32)
    ]
    optimizer: Any = Lookahead(torch.optim.SGD(weights, lr=0.5), sync_every=1, implementation="foreach")
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.last_step == {"reference": 2, "foreach": 1}
    for weight in weights:
        assert torch.equal(weight, torch.full_like(weight, 0.75))  # from 1, half of the way to 0.5


def test_the_reference_is_the_default_on_the_processor():
    weight = nn.Parameter(torch.ones(3))
    optimizer: Any = Lookahead(torch.optim.SGD([weight], lr=0.5), sync_every=1)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.last_step == {"reference": 1}


def test_an_unknown_implementation_of_lookahead_is_refused():
    with pytest.raises(
        ValueError, match="implementation must be one of auto, reference, foreach, got 'fused'"
    ):
        Lookahead(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), implementation="fused")  # pyright: ignore


@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.SGD, LAMB], ids=lambda kind: kind.__name__)
def test_a_half_precision_model_goes_on_from_the_checkpoint_of_a_full_one(inner):
    def stepped(dtype: torch.dtype, state_dict: dict[str, Any] | None, settings: dict[str, Any]) -> Any:
        weight = nn.Parameter(torch.ones(3, 4, dtype=dtype))
        optimizer = Lookahead(inner([weight], lr=0.01, **settings))
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return optimizer, optimizer.state[weight]

    settings = {"momentum": 0.9} if inner is torch.optim.SGD else {}
    full, _ = stepped(torch.float32, None, settings)
    _, state = stepped(torch.bfloat16, full.state_dict(), settings)
    assert state["slow"].dtype == torch.float32
