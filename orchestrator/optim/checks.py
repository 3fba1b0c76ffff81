"""Checks of hyper-parameters, gradients and parameters that all optimizers here share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.optim.fast.items import is_sharded

IMPLEMENTATIONS = ("auto", "reference", "foreach", "fused")
NONFINITE = ("propagate", "skip", "raise")


def check_number(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high.

    Raises:
        ValueError: `value` is no real number (True is none), NaN, or outside [low, high).
    """
    if not _is_number(value) or not low <= float(value) < high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}), got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not _is_number(value) or not 0 < float(value) <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: Any, *, low: int) -> None:
    """Raise ValueError unless `value` is an integer (True is none) >= low."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def check_flags(group: dict[str, Any], *names: str) -> None:
    """Raise ValueError unless these settings are True or False: the text "no" would count as True."""
    for name in names:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")


def check_betas(betas: Any) -> None:
    """Raise ValueError unless `betas` are two numbers in [0, 1).

    Raises:
        ValueError: another count of values, or one outside [0, 1).
    """
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, low=0.0, high=1.0)


def check_rate(lr: Any) -> None:
    """Raise ValueError unless `lr` is a number in [0, inf) or a tensor of one element.

    The value of a tensor is not read where reading would wait for a device.
    """
    if not isinstance(lr, Tensor):
        check_number("lr", lr, low=0.0)
    elif lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(
            "lr must be a number in [0, inf) or a floating-point tensor of one element, got one of "
            f"{lr.dtype} and shape {tuple(lr.shape)}"
        )
    elif type(lr) is Tensor and lr.device.type == "cpu":
        check_number("lr", lr.item(), low=0.0)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_not_empty(optimizer: str, params: list[Any]) -> list[Any]:
    """The list; raise ValueError if it is empty."""
    if not params:
        raise ValueError(f"{optimizer} needs at least one parameter, got an empty list")
    return params


def check_is_group(group: Any) -> None:
    """Raise ValueError unless `group` is a dict with "params"."""
    if not isinstance(group, dict) or "params" not in group:
        raise ValueError(f"a parameter group is a dict with 'params', got {_in_short(group)}")


def _in_short(value: Any) -> str:
    return f"one with {', '.join(map(repr, value))}" if isinstance(value, dict) else type(value).__name__


def check_distinct(params: Iterable[Any]) -> None:
    """Raise ValueError if a parameter is listed twice in one group."""
    seen: dict[int, int] = {}
    for index, entry in enumerate(params):
        tensor = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(tensor, Tensor):
            continue  # torch says what it is
        first = seen.setdefault(id(tensor), index)
        if first != index:
            raise ValueError(
                f"a parameter group lists each parameter once, got the one of shape {tuple(tensor.shape)} at "
                f"positions {first} and {index}"
            )


def refuse_sparse(optimizer: str, weight: Tensor) -> None:
    """Raise ValueError if the gradient of `weight` is sparse."""
    if weight.grad is not None and weight.grad.layout != torch.strided:
        raise ValueError(
            f"{optimizer} does not support sparse gradients, got one of shape {tuple(weight.shape)}. Make the "
            "layer dense (for nn.Embedding: sparse=False), or give this parameter to another optimizer: SparseAdam."
        )


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether no gradient holds an infinity or NaN; waits for the device. All ranks of a DTensor agree."""
    found: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        # Of a sharded one each rank looks at its own part, and at none where it has none.
        local = gradient.to_local() if is_sharded(gradient) else gradient  # pyright: ignore[reportAttributeAccessIssue]
        mesh = gradient.device_mesh if is_sharded(gradient) else None  # pyright: ignore[reportAttributeAccessIssue]
        bad = found.setdefault(mesh, [torch.zeros((), device=local.device)])
        if local.numel():
            bad.append((~torch.isfinite(torch.linalg.vector_norm(local, ord=torch.inf))).to(bad[0]))
    flags = {mesh: torch.stack(bad).amax() for mesh, bad in found.items()}
    for mesh, flag in flags.items():
        # Not the largest norm, which would lose a NaN: the maximum of gloo and of NCCL takes the number.
        for group in () if mesh is None else mesh.get_all_groups():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return not any(bool(flag) for flag in flags.values())
