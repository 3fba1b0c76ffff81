"""Averages of the weights: their values, and that a resumed run has the same ones."""

import copy

import pytest
import torch
from small_training import assert_same_parameters, over_all, small_model, train
from torch import nn

from orchestrator.optim.averaging import averaged_weights, keep_average


def weights_1_to_6(kind, start_step, **options):
    # SGD with lr 1 along -1 from 0: after step t the weight is t.
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    keep_average(optimizer, kind=kind, start_step=start_step, **options)
    for _ in range(6):
        weight.grad = -torch.ones(1)
        optimizer.step()
    return weight, optimizer


def test_swa_is_the_mean_of_the_last_weights():
    weight, optimizer = weights_1_to_6("swa", 3)
    with averaged_weights(optimizer):
        assert weight.item() == 5.0  # (4 + 5 + 6) / 3
    assert weight.item() == 6.0


def test_ema_begins_at_the_first_weights_averaged():
    weight, optimizer = weights_1_to_6("ema", 3, decay=0.5)
    with averaged_weights(optimizer):
        assert weight.item() == 5.25  # 4; 4.5; 5.25


@over_all
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_a_resumed_run_has_the_same_weights_and_averages(make, kind):
    def model_and_optimizer():
        model = small_model()
        optimizer = make(model.parameters())
        keep_average(optimizer, kind=kind, start_step=6)
        return model, optimizer

    straight, stopped, resumed = (model_and_optimizer() for _ in range(3))
    train(*straight, range(12))
    train(*stopped, range(8))
    resumed[0].load_state_dict(copy.deepcopy(stopped[0].state_dict()))
    resumed[1].load_state_dict(copy.deepcopy(stopped[1].state_dict()))
    train(*resumed, range(8, 12))
    assert_same_parameters(straight[0], resumed[0])
    with averaged_weights(straight[1]), averaged_weights(resumed[1]):
        assert_same_parameters(straight[0], resumed[0])


@pytest.mark.parametrize(
    "options",
    [{"kind": "mean"}, {"decay": 1.0}, {"decay": "0.9"}, {"start_step": -1}, {"start_step": 2.5}],
)
def test_a_bad_average_is_refused(options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="got"):
        keep_average(optimizer, **{"kind": "swa", "start_step": 0, **options})


def test_weights_whose_average_has_not_started_stay_as_they_are():
    weight, optimizer = weights_1_to_6("swa", 6)
    with averaged_weights(optimizer):
        assert weight.item() == 6.0
