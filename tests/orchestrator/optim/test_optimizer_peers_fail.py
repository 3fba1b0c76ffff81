"""The defects of other libraries that `test_optimizer_peer_defects.py` claims we do not have, seen in them.

Each test passes while the peer still has its defect; one that fails says that the peer was mended.
"""

import copy
import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as checkpoint_state
from sharded_training import on_ranks
from torch import nn

from orchestrator.optim import RangerLARS

needs_pytorch_optimizer = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch_optimizer is not installed"
)
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def step_along(optimizer, weight, gradient):
    weight.grad = gradient.clone()
    before = weight.detach().clone()
    optimizer.step()
    return weight.detach() - before


@needs_pytorch_optimizer
def test_ranger_of_pytorch_optimizer_ascends_in_its_first_steps():
    import pytorch_optimizer

    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = pytorch_optimizer.Ranger([weight], lr=0.1)
    moved = step_along(optimizer, weight, torch.tensor([1.0, -1.0]))
    assert moved[0] > 0 > moved[1]


@needs_pytorch_optimizer
@pytest.mark.parametrize(("weights", "right", "theirs"), [((0.6, 0.8), 0.01, 0.1), ((30.0, 40.0), 0.5, 1.0)])
def test_lamb_of_pytorch_optimizer_makes_a_tenfold_first_step_and_clamps_the_weight_norm(
    weights, right, theirs
):
    import pytorch_optimizer

    # The step of the paper's final form has the length lr ||w||; theirs 10 lr min(||w||, 10).
    weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    moved = step_along(pytorch_optimizer.Lamb([weight], lr=0.01), weight, torch.ones(2, dtype=torch.float64))
    assert moved.norm().item() == pytest.approx(theirs, rel=1e-2)
    assert moved.norm().item() != pytest.approx(right, rel=0.5)


@needs_timm
def test_lookahead_of_timm_does_nothing_at_its_first_synchronization():
    from timm.optim import Lookahead

    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lookahead(torch.optim.SGD([weight], lr=0.4), k=1, alpha=0.5)
    assert step_along(optimizer, weight, torch.ones(1)).item() == pytest.approx(-0.4)  # 0.2 with slow weights


@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_the_rule_of_over9000_adapts_nothing(scale):
    # The ratio is ||w|| / ||w - step||, about 1: the step does not know how large the weights are.
    torch.manual_seed(0)
    direction, gradient = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    weight = nn.Parameter(scale * direction)
    moved = step_along(RangerLARS([weight], lr=1e-5, compat="over9000"), weight, gradient)
    torch.testing.assert_close(moved, -1e-5 * gradient, rtol=1e-2, atol=0)


@needs_pytorch_optimizer
def test_some_of_pytorch_optimizer_change_the_gradient():
    import pytorch_optimizer

    changed = []
    for name in ("Ranger", "Ranger21", "Lamb", "LARS", "NovoGrad", "AdaBelief"):
        weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))
        options = {"num_iterations": 10} if name == "Ranger21" else {}
        optimizer = getattr(pytorch_optimizer, name)([weight], weight_decay=0.1, **options)
        gradient = torch.arange(9.0).reshape(3, 3).square()
        weight.grad = gradient.clone()
        optimizer.step()
        if not torch.equal(weight.grad, gradient):
            changed.append(name)
    assert changed, "no gradient was changed"


def crashes_on_sharded_parameters(folder):
    """By name of pytorch_optimizer: the error of seven steps on DTensors, or None."""
    import pytorch_optimizer
    from torch.distributed.fsdp import fully_shard

    errors = {}
    makers = {name: getattr(pytorch_optimizer, name) for name in ("LARS", "Lamb", "Ranger", "NovoGrad")}
    makers["Lookahead"] = lambda params, lr: pytorch_optimizer.Lookahead(
        torch.optim.AdamW(params, lr=lr), k=1
    )
    for name, make in makers.items():
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        split = fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
        try:
            optimizer = make(split.parameters(), lr=0.01)
            for _ in range(7):
                split(torch.ones(2, 3)).square().mean().backward()
                optimizer.step()
            errors[name] = None
        except Exception as error:  # whatever it is, it is the finding
            errors[name] = f"{type(error).__name__}: {error}"[:200]
    return errors


@needs_pytorch_optimizer
@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_pytorch_optimizer_crashes_on_sharded_parameters(tmp_path):
    errors = on_ranks(2, tmp_path, crashes_on_sharded_parameters)[0]
    assert [name for name, error in errors.items() if error is None] == [], errors


def resume_of(make):
    """Largest difference after a resume through distributed-checkpoint state, or the error's name."""

    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return model, make(model.parameters())

    def train(model, optimizer, num_steps):
        for _ in range(num_steps):
            optimizer.zero_grad()
            (model(torch.ones(2, 3)) - 1).square().sum().backward()
            optimizer.step()

    straight, straight_optimizer = model_and_optimizer()
    train(straight, straight_optimizer, 7)
    try:
        saved = copy.deepcopy(checkpoint_state.get_state_dict(straight, straight_optimizer))
        train(straight, straight_optimizer, 5)
        resumed, resumed_optimizer = model_and_optimizer()
        checkpoint_state.set_state_dict(
            resumed, resumed_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1]
        )
        train(resumed, resumed_optimizer, 5)
    except (KeyError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        return type(error).__name__
    return max((a - b).abs().max().item() for a, b in zip(straight.parameters(), resumed.parameters()))


@needs_pytorch_optimizer
def test_a_distributed_checkpoint_does_not_resume_pytorch_optimizers_ranger21_and_lookahead():
    import pytorch_optimizer

    difference = resume_of(lambda params: pytorch_optimizer.Ranger21(params, num_iterations=100, lr=0.05))
    assert isinstance(difference, str) or difference > 1e-5, difference
    answer = resume_of(lambda params: pytorch_optimizer.Lookahead(torch.optim.AdamW(params, lr=0.05)))
    assert isinstance(answer, str), answer
