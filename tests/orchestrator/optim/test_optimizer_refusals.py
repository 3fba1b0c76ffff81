"""Bad hyper-parameters and unsupported gradients are refused by a sentence."""

import pytest
import torch
from small_training import over_own
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS


def lookahead(params, **options):
    return Lookahead(torch.optim.SGD(params, lr=0.1), **options)


@over_own
def test_sparse_gradients_are_refused_before_anything_moves(make):
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = make([dense, *table.parameters()])
    (dense.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(ValueError, match=r"does not support sparse gradients.*\(4, 2\).*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LARS, {"lr": -1.0}, r"lr must be a number in \[0, inf\), got -1.0"),
        (LARS, {"lr": float("nan")}, "got nan"),
        (LARS, {"implementation": "triton"}, "implementation must be one of auto, .*fused, got 'triton'"),
        (LAMB, {"nonfinite": "ignore"}, "nonfinite must be one of propagate, skip, raise, got 'ignore'"),
        (RangerLARS, {"compat": "fastai"}, "compat must be None or 'over9000', got 'fastai'"),
        (RangerLARS, {"compat": "over9000", "trust": "before_rectify"}, "leave trust out"),
        (LARS, {"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        (LARS, {"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        (LARS, {"trust_coefficient": -0.1}, "trust_coefficient"),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas\[1\] must be a number in \[0, 1\), got 1.0"),
        (LAMB, {"betas": (0.9,)}, "betas must be two numbers"),
        (LAMB, {"eps": -1e-8}, "eps"),
        (LAMB, {"weight_decay": "1e-4"}, "weight_decay .* got '1e-4'"),
        (Ranger, {"sync_every": 0}, "sync_every must be an integer >= 1, got 0"),
        (Ranger, {"sync_every": 2.5}, "sync_every must be an integer >= 1, got 2.5"),
        (Ranger, {"slow_step_size": 0.0}, r"slow_step_size must be a number in \(0, 1\], got 0"),
        (Ranger, {"rectify_above": 3.0}, r"rectify_above must be a number in \[4, inf\), got 3.0"),
        (RangerLARS, {"trust": "lars"}, "trust must be one of direction, before_rectify, got 'lars'"),
        (RangerLARS, {"slow_step_size": 1.5}, r"slow_step_size must be a number in \(0, 1\], got 1.5"),
        (Ranger, {"slow_step_size": -0.5}, r"slow_step_size must be a number in \(0, 1\], got -0.5"),
        (Ranger, {"slow_step_size": None}, r"slow_step_size must be a number in \(0, 1\], got None"),
        (lookahead, {"sync_every": 0}, "sync_every must be an integer >= 1, got 0"),
        (lookahead, {"slow_step_size": 2}, r"slow_step_size must be a number in \(0, 1\], got 2"),
    ],
)
def test_bad_hyperparameters_are_refused_with_value_and_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("make", [LARS, LAMB, Ranger, RangerLARS])
def test_no_parameters_and_repeated_parameters_are_refused(make):
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one parameter, got an empty list"):
        make([])
    with pytest.raises(
        ValueError, match=r"each parameter once, got the one of shape \(2, 3\) at positions 0 and 1"
    ):
        make([weight, weight])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [weight]}, {"params": [weight]}])


@pytest.mark.parametrize("lr", [torch.tensor(-1.0), torch.ones(2), torch.tensor(float("nan"))])
def test_a_bad_rate_tensor_is_refused(lr):
    with pytest.raises(ValueError, match="lr must be a number in"):
        LAMB([nn.Parameter(torch.ones(2))], lr=lr)


def test_a_group_with_a_bad_hyperparameter_is_refused_and_not_added():
    optimizer = LAMB([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LARS, {"lr": True}, r"lr must be a number in \[0, inf\), got True"),
        (LARS, {"nesterov": "no"}, "nesterov must be True or False, got 'no'"),
        (LAMB, {"layer_adaptation": "no"}, "layer_adaptation must be True or False, got 'no'"),
        (LAMB, {"lr": torch.tensor(1)}, "floating-point tensor of one element, got one of torch.int64"),
        (Ranger, {"gradient_centralization": None}, "must be True or False, got None"),
        (RangerLARS, {"slow_step_size": True}, r"slow_step_size must be a number in \(0, 1\], got True"),
    ],
)
def test_a_setting_of_another_type_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("params", [[{"params": []}], [{"lr": 0.1}], nn.Linear(2, 2), "weights", None])
def test_what_holds_no_parameters_is_refused_in_a_sentence(params):
    with pytest.raises(ValueError, match="got"):
        LAMB(params)


@pytest.mark.parametrize("optimizer", ["adam", None, torch.optim.SGD])
def test_lookahead_around_something_else_is_refused(optimizer):
    with pytest.raises(ValueError, match="optimizer must be a torch optimizer, got"):
        Lookahead(optimizer)
