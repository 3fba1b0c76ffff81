"""Groups of parameters: no weight decay for biases and normalization, and rates by depth for fine-tuning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orchestrator.optim.checks import check_share

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
        ValueError: the module has no parameters, or some that have no shape yet (lazy ones); `exclude` cannot be
            called.

    >>> [len(group["params"]) for group in parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))]
    [1, 3]
    """
    if exclude is not None and not callable(exclude):
        raise ValueError(f"exclude must be a function of a name and a parameter, got {exclude!r}")
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet. Run the model once before its optimizer is made")
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


def rates_by_depth(
    module: nn.Module, groups: Sequence[dict[str, Any]], *, lr: float | Tensor, decay: float
) -> list[dict[str, Any]]:
    """Split groups so that parts nearer to the input of a trained module move less.

    The children of `module`, in the order in which it registers them, are its levels; the entries of a
    Sequential or ModuleList count one by one. A parameter of level d of D has the rate

        lr decay^(D - d),   d = 1 ... D

    and one that several levels share, or that lies in the module itself, that of the first of them.

    Args:
        module: whose parameters the groups hold.
        groups: as `parameter_groups` makes them.
        lr: of the last level.
        decay: factor from a level to the one below, in (0, 1].

    Returns:
        Groups with "lr", the last level's first; no empty group.

    Raises:
        ValueError: decay out of its range, or a group with a parameter that is not the module's.

    >>> module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
    >>> [group["lr"] for group in rates_by_depth(module, [{"params": list(module.parameters())}], lr=1, decay=0.5)]
    [1.0, 0.5, 0.25]

    Reference: Howard and Ruder, 2018, arXiv 1801.06146, section 3.2 (discriminative fine-tuning).
    """
    check_share("depth_decay", decay)
    levels = _levels(module)
    level_of: dict[int, int] = {id(parameter): 0 for parameter in module.parameters(recurse=False)}
    for level, part in enumerate(levels):
        for parameter in part.parameters():
            level_of.setdefault(id(parameter), level)
    for parameter in itertools.chain.from_iterable(group["params"] for group in groups):
        if id(parameter) not in level_of:
            raise ValueError(
                f"a group holds a parameter of shape {tuple(parameter.shape)} that {type(module).__name__} has not"
            )
    split = []
    for level in reversed(range(len(levels) or 1)):
        for group in groups:
            members = [parameter for parameter in group["params"] if level_of[id(parameter)] == level]
            if members:
                rate = lr * float(decay) ** (max(len(levels), 1) - 1 - level)
                split.append({**group, "params": members, "lr": rate})
    return split


def _levels(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    if len(children) == 1 and not list(module.parameters(recurse=False)):
        return _levels(children[0]) or children
    opened: list[nn.Module] = []
    for child in children:
        opened += _levels(child) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return [part for part in opened if any(True for _ in part.parameters())]
