"""Optimizers by name, and the parameter groups made from a module."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator import optim
from orchestrator.optim import build_optimizer, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm([2, 4])  # a gain of two dims
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight  # shared


def test_biases_and_normalization_get_no_decay_and_no_adaptation():
    model = Model()
    decayed, excluded = parameter_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model.embed.weight), id(model.hidden.weight)]
    assert [id(p) for p in excluded["params"]] == [
        id(model.norm.weight),
        id(model.norm.bias),
        id(model.hidden.bias),
    ]
    assert (excluded["weight_decay"], excluded["layer_adaptation"]) == (0.0, False)
    assert set(decayed) == {"params"}


def test_a_predicate_excludes_by_any_name_of_a_shared_parameter():
    model = Model()
    groups = parameter_groups(model, exclude=lambda name, parameter: name == "head.weight")
    assert id(model.embed.weight) in {id(p) for p in groups[1]["params"]}


def test_each_parameter_is_in_one_group_and_none_is_empty():
    for module in (Model(), nn.Linear(2, 2, bias=False), nn.LayerNorm(3)):
        groups = parameter_groups(module)
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in module.parameters())
        assert all(group["params"] for group in groups)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        parameter_groups(nn.ReLU())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lars", optim.LARS),
        ("lamb", optim.LAMB),
        ("ranger", optim.Ranger),
        ("ranger_lars", optim.RangerLARS),
        ("sgd", torch.optim.SGD),
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("radam", torch.optim.RAdam),
        ("nadam", torch.optim.NAdam),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
        ("adadelta", torch.optim.Adadelta),
        ("adamax", torch.optim.Adamax),
        ("asgd", torch.optim.ASGD),
        ("rprop", torch.optim.Rprop),
        ("lbfgs", torch.optim.LBFGS),
        ("sparse_adam", torch.optim.SparseAdam),
    ],
)
def test_each_name_builds_its_class_from_a_module(name, expected):
    optimizer = build_optimizer(name, Model(), lr=0.01)
    assert type(optimizer) is expected
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_weight_decay_of_a_module_reaches_only_its_weights():
    optimizer = build_optimizer("ranger_lars", Model(), weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["layer_adaptation"] for group in optimizer.param_groups] == [True, False]


def test_bare_parameters_are_used_as_they_are():
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer("adamw", [weight], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamz'; known: .*adamw.*ranger_lars.*sgd"):
        build_optimizer("adamz", Model())


def test_unknown_hyperparameter_is_named_with_the_accepted():
    with pytest.raises(
        ValueError, match=re.escape("lamb has no hyper-parameter 'momentum'; it accepts lr, betas")
    ):
        build_optimizer("lamb", Model(), momentum=0.9)


def test_exclude_without_a_module_is_refused():
    with pytest.raises(ValueError, match="exclude needs a module"):
        build_optimizer("lamb", Model().parameters(), exclude=lambda name, parameter: True)


def test_entry_points_name_the_classes_that_the_registry_builds():
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    points = tomllib.loads(pyproject.read_text())["project"]["entry-points"]["lowtide.optimizers"]
    assert set(points) == {"lars", "lamb", "ranger", "ranger_lars"}
    for name, target in points.items():
        module, attribute = target.split(":")
        assert getattr(import_module(module), attribute) is optim.optimizer_class(name)
