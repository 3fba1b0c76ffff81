"""The optimizers of pytorch_optimizer by name, and rates by depth."""

import importlib.util

import pytest
import torch
from torch import nn

from orchestrator import optim
from orchestrator.optim import build_optimizer, rates_by_depth
from planner.inputs import long_tail

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch_optimizer is not installed"
)


@needs_peer
@pytest.mark.parametrize(("name", "class_name"), [("novograd", "NovoGrad"), ("adabelief", "AdaBelief")])
def test_a_name_of_pytorch_optimizer_builds_its_class(name, class_name):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(name, model, lr=0.01, weight_decay=0.1)
    assert type(optimizer).__name__ == class_name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


@needs_peer
def test_names_that_several_libraries_know_are_ours_or_torchs():
    assert optim.optimizer_class("ranger") is optim.Ranger
    assert optim.optimizer_class("adamw") is torch.optim.AdamW


def test_without_pytorch_optimizer_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(long_tail, "PACKAGE", "a_package_that_is_not_there")
    monkeypatch.setattr(optim, "is_installed", long_tail.is_installed)
    with pytest.raises(
        ValueError, match=r"unknown optimizer 'novograd'; known: .*sgd.*pip install 'lowtide\[opt"
    ):
        build_optimizer("novograd", nn.Linear(2, 2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 5, bias=False)


def test_rates_by_depth_need_a_rate_that_is_a_number():
    with pytest.raises(ValueError, match=r"depth_decay needs a number as lr of lamb, got '0.1'"):
        build_optimizer("lamb", Model(), lr="0.1", depth_decay=0.5)


def test_rates_fall_by_level_from_the_head_to_the_embedding():
    model = Model()
    optimizer = build_optimizer("lamb", model, lr=0.8, weight_decay=0.1, depth_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.head.weight)] == 0.8
    assert rates[id(model.blocks[1].weight)] == rates[id(model.blocks[1].bias)] == 0.4
    assert rates[id(model.blocks[0].weight)] == 0.2
    assert rates[id(model.embed.weight)] == 0.1
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (decays[id(model.blocks[0].weight)], decays[id(model.blocks[0].bias)]) == (0.1, 0.0)


def test_a_parameter_that_two_levels_share_has_the_rate_of_the_lower_one():
    model = Model()
    model.head.weight = model.embed.weight
    groups = rates_by_depth(model, [{"params": list(model.parameters())}], lr=1.0, decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.embed.weight)] == 0.125
    assert len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize("decay", [0.0, 1.5, "0.8"])
def test_a_bad_decay_by_depth_is_refused(decay):
    with pytest.raises(ValueError, match=r"depth_decay must be a number in \(0, 1\], got"):
        build_optimizer("lamb", Model(), depth_decay=decay)


def test_depth_needs_a_module():
    with pytest.raises(ValueError, match="depth_decay needs a module"):
        build_optimizer("lamb", Model().parameters(), depth_decay=0.5)
