"""LookAhead: what wrapping another optimizer, and having slow weights, must not break."""

import copy
from typing import Any

import pytest
import torch
from small_training import assert_same_parameters, lookahead_sgd, small_model, train
from torch import nn

from orchestrator.optim import Lookahead, Ranger, RangerLARS, slow_weights

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
