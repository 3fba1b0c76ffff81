"""Which parameters get weight decay and layer adaptation: not biases, not normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Predicate = Callable[[str, nn.Parameter], bool]
"""Full name and parameter -> True to exclude it from weight decay and layer adaptation."""

NORMALIZATION_LAYERS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    module: nn.Module, *, exclude: Predicate | None = None, layer_adaptation: bool = True
) -> list[dict[str, Any]]:
    """Split a module's parameters into those with weight decay and those without.

    Excluded, with weight decay 0: every parameter with at most one dim, every one called "bias", all of a
    normalization layer (whatever its shape), and what `exclude` names. A parameter that several modules share
    is listed once, and excluded if one of its places excludes it. Frozen parameters are listed as well:
    optimizers skip what has no gradient, and thawing one needs no new group.

    Args:
        module: whose parameters, in the order of `module.parameters()`.
        exclude: excludes more; called with the full name and the parameter.
        layer_adaptation: mark the excluded group with layer_adaptation=False, which LARS, LAMB and RangerLARS
            read. Off for optimizers that do not know the option.

    Returns:
        Parameter groups for an optimizer: the decayed ones first, no empty group. The decayed group sets
        nothing, so it takes the optimizer's own weight decay.

    Raises:
        ValueError: the module has no parameters.

    >>> [len(group["params"]) for group in parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))]
    [1, 3]
    """
    excluded_ids = {
        id(parameter)
        for module_name, owner in module.named_modules(remove_duplicate=False)
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if _is_bias_or_normalization(owner, name, parameter)
        or (exclude is not None and exclude(f"{module_name}.{name}" if module_name else name, parameter))
    }
    parameters = list(module.parameters())
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters to optimize")
    without_decay: dict[str, Any] = {
        "params": [parameter for parameter in parameters if id(parameter) in excluded_ids],
        "weight_decay": 0.0,
    }
    if layer_adaptation:
        without_decay["layer_adaptation"] = False
    with_decay = {"params": [parameter for parameter in parameters if id(parameter) not in excluded_ids]}
    return [group for group in (with_decay, without_decay) if group["params"]]


def _is_bias_or_normalization(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1 or name == "bias" or isinstance(owner, NORMALIZATION_LAYERS)
