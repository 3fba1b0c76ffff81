"""Checks of hyper-parameters, gradients and parameters that all optimizers here share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.fast.items import is_sharded

IMPLEMENTATIONS = ("auto", "reference", "foreach", "fused")
NONFINITE = ("propagate", "skip", "raise")


def check_number(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high.

    Raises:
        ValueError: `value` is no real number, NaN, or outside [low, high).
    """
    if not isinstance(value, numbers.Real) or not low <= float(value) < high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}), got {value!r}")


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
    elif lr.numel() != 1 or lr.is_complex():
        raise ValueError(
            f"lr must be a number in [0, inf) or a real tensor of one element, got one of shape {tuple(lr.shape)}"
        )
    elif type(lr) is Tensor and lr.device.type == "cpu":
        check_number("lr", lr.item(), low=0.0)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_distinct(params: Iterable[Any]) -> None:
    """Raise ValueError if a parameter is listed twice in one group."""
    seen: dict[int, int] = {}
    for index, entry in enumerate(params):
        tensor = entry[1] if isinstance(entry, tuple) else entry
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
    largest = [torch.linalg.vector_norm(g, ord=torch.inf) for g in gradients if g.numel()]
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in largest]  # pyright: ignore[reportAttributeAccessIssue]
    return all(bool(torch.isfinite(norm)) for norm in whole)
