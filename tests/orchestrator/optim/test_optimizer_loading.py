"""A state_dict that does not fit is refused when it is loaded, and nothing has changed then."""

import copy
from typing import Any

import pytest
import torch
from small_training import ALL, OWN, small_model, train
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS


def trained(make, shapes=((3, 4), (4,)), num_steps=3) -> tuple[list[nn.Parameter], Any]:
    weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make(weights)
    for _ in range(num_steps):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weights, optimizer


def lookahead_lamb(params):
    return Lookahead(LAMB(params))


@pytest.mark.parametrize("make", [*OWN, lookahead_lamb], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shapes", [((30, 40), (400,)), ((2, 2), (2,)), ((4, 3), (4,))], ids=str)
def test_state_of_other_shapes_is_refused_instead_of_read_past_its_end(make, shapes):
    saved = trained(make)[1].state_dict()
    if not saved["state"] or not saved["state"][0]:
        pytest.skip("this one has no state")
    _, optimizer = trained(make, shapes, num_steps=0)
    with pytest.raises(ValueError, match=r"must be a tensor of that shape, got \(3, 4\)"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


@pytest.mark.parametrize("implementation", ["fused", "foreach", "reference"])
def test_weights_that_grew_after_their_state_was_made_raise(implementation):
    weights, optimizer = trained(lambda params: LAMB(params, implementation=implementation))
    weights[0].data = torch.ones(30, 40)
    weights[0].grad = torch.ones(30, 40)
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


FOREIGN = {
    "lars": LARS,
    "lamb": LAMB,
    "ranger": Ranger,
    "ranger_lars": RangerLARS,
    "lookahead_lamb": lookahead_lamb,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("loads", ["lars", "lamb", "ranger", "ranger_lars"])
@pytest.mark.parametrize("saves", FOREIGN)
def test_the_state_dict_of_another_optimizer_is_refused(saves, loads):
    if saves == loads:
        pytest.skip("its own")
    _, optimizer = trained(FOREIGN[loads])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="the state_dict is of an"):
        optimizer.load_state_dict(trained(FOREIGN[saves])[1].state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    for index, state in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(before["state"][index][k]))
            for k, v in state.items()
        )


@pytest.mark.parametrize(
    ("key", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("implementation", "triton")]
)
def test_a_setting_out_of_range_in_a_state_dict_is_refused(key, value):
    saved = trained(LAMB)[1].state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match="must be"):
        trained(LAMB)[1].load_state_dict(saved)


@pytest.mark.parametrize("value", [-5, torch.tensor(3.0), True])
def test_a_count_that_is_none_is_refused(value):
    saved = trained(LAMB)[1].state_dict()
    saved["state"][0]["step"] = value
    with pytest.raises(ValueError, match=r"'step' of a parameter of shape .* must be an integer >= 0, got"):
        trained(LAMB)[1].load_state_dict(saved)


@pytest.mark.parametrize("make", [*ALL, lookahead_lamb], ids=lambda make: make.__name__)
def test_a_state_dict_can_be_loaded_twice_and_after_a_skipped_first_step(make):
    model = small_model()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 5))


def test_a_lookahead_whose_first_step_was_skipped_resumes():
    weight = nn.Parameter(torch.ones(3))
    optimizer: Any = Lookahead(LAMB([weight], nonfinite="skip"))
    weight.grad = torch.full((3,), float("nan"))
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.optimizer.skipped_steps == 1


def test_lookahead_follows_the_wrapped_optimizer_when_that_one_loads():
    _, optimizer = trained(lookahead_lamb)
    optimizer.optimizer.load_state_dict(trained(LAMB)[1].state_dict())
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    optimizer.step()
