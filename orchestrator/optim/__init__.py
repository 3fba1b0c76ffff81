"""Optimizers by name: this project's own, torch's, and those of pytorch_optimizer where it is installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from orchestrator.optim.lamb import LAMB
from orchestrator.optim.lars import LARS
from orchestrator.optim.lookahead import Lookahead, slow_weights
from orchestrator.optim.param_groups import Predicate, parameter_groups, rates_by_depth
from orchestrator.optim.per_tensor import Params
from orchestrator.optim.ranger import Ranger
from orchestrator.optim.ranger_lars import RangerLARS
from planner.inputs.long_tail import INSTALL, is_installed, long_tail_class, long_tail_names
from planner.inputs.optimizers import torch_optimizers

__all__ = [
    "LAMB",
    "LARS",
    "Lookahead",
    "Predicate",
    "Ranger",
    "RangerLARS",
    "accepted_hyperparameters",
    "build_optimizer",
    "optimizer_class",
    "optimizer_names",
    "parameter_groups",
    "rates_by_depth",
    "slow_weights",
]

_OWN: Mapping[str, type[torch.optim.Optimizer]] = {
    "lamb": LAMB,
    "lars": LARS,
    "ranger": Ranger,
    "ranger_lars": RangerLARS,
}


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    return {**torch_optimizers(), **_OWN}


def optimizer_names() -> list[str]:
    """All names that `build_optimizer` knows, sorted."""
    return sorted({*_classes(), *long_tail_names()})


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name.

    Args:
        name: "lars", "lamb", "ranger", "ranger_lars"; a class of torch.optim in snake case ("adamw", "sgd"); or a
            name of pytorch_optimizer ("novograd"), where that is installed. The first that knows it has it.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    found = _classes().get(name) or long_tail_class(name)
    if found is None:
        more = "" if is_installed() else f". NovoGrad, AdaHessian and more come with {INSTALL}"
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(optimizer_names())}{more}")
    return found


def accepted_hyperparameters(name: str) -> list[str]:
    """Names of the hyper-parameters that an optimizer takes, in the order of its signature.

    Raises:
        ValueError: unknown name.
    """
    parameters = list(inspect.signature(optimizer_class(name)).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _default_rate(name: str) -> Any:
    """The rate that an optimizer takes if none is given; None where it has none."""
    parameter = inspect.signature(optimizer_class(name)).parameters.get("lr")
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def build_optimizer(
    name: str,
    params_or_module: nn.Module | Params,
    *,
    exclude: Predicate | None = None,
    depth_decay: float | None = None,
    **hyperparameters: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    From a module it makes the groups of `parameter_groups`: no weight decay, and no layer adaptation, for
    biases and normalization. Optimizers without a weight decay get one group.

    Args:
        name: see `optimizer_class`.
        params_or_module: a module, or what a torch optimizer takes: tensors or groups, used as they are.
        exclude: excludes more parameters of a module; see `parameter_groups`.
        depth_decay: for fine-tuning, the factor of the rate from one level of a module to the one below it; see
            `rates_by_depth`. None for one rate.
        **hyperparameters: of the optimizer; what is absent takes the optimizer's default.

    Raises:
        ValueError: unknown name or hyper-parameter (the message lists the accepted ones), a value out of its
            range, or `exclude` or `depth_decay` without a module.
    """
    optimizer = optimizer_class(name)
    accepted = accepted_hyperparameters(name)
    unknown = [key for key in hyperparameters if key not in accepted]
    if unknown:
        raise ValueError(
            f"{name} has no hyper-parameter {', '.join(map(repr, unknown))}; it accepts {', '.join(accepted)}"
        )
    if isinstance(params_or_module, nn.Module):
        module = params_or_module
        if "weight_decay" in accepted:
            adapts = "layer_adaptation" in accepted
            groups = parameter_groups(module, exclude=exclude, layer_adaptation=adapts)
        else:
            groups = [{"params": list(module.parameters())}]
        if depth_decay is not None:
            rate = hyperparameters.get("lr", _default_rate(name))
            if not isinstance(rate, int | float | torch.Tensor):
                raise ValueError(f"depth_decay needs a number as lr of {name}, got {rate!r}")
            groups = rates_by_depth(module, groups, lr=rate, decay=depth_decay)
        return optimizer(groups, **hyperparameters)
    if depth_decay is not None:
        raise ValueError("depth_decay needs a module, whose parts have depths; got bare parameters")
    if exclude is not None:
        raise ValueError("exclude needs a module, whose parameters have names; got bare parameters")
    return optimizer(params_or_module, **hyperparameters)
