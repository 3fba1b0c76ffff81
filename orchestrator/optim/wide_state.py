"""State of 16-bit parameters in float32: how it is made, and how it survives torch's loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def zeros_of(weight: Tensor) -> Tensor:
    """Zeros of the weight's shape and strides, in float32 if it has 16 bits."""
    dtype = torch.float32 if weight.dtype in SIXTEEN_BITS else weight.dtype
    return torch.zeros_like(weight.detach(), dtype=dtype, memory_format=torch.preserve_format)


def copy_of(weight: Tensor) -> Tensor:
    """A copy of the weight, in float32 if it has 16 bits."""
    if weight.dtype in SIXTEEN_BITS:
        return zeros_of(weight).copy_(weight.detach())
    return weight.detach().clone(memory_format=torch.preserve_format)


def restore_wide_state(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], *, only: str | None = None
) -> None:
    """Give 16-bit parameters their float32 state back, which torch's `load_state_dict` has rounded.

    Args:
        optimizer: has just loaded `state_dict`.
        state_dict: as it was handed over.
        only: the name of what is kept in float32, where the rest is of an optimizer that keeps it as the parameters
            are; None for all of it.
    """
    loaded = state_dict["state"]
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for weight, index in zip(group["params"], saved["params"]):
            if weight.dtype not in SIXTEEN_BITS:
                continue
            for key, value in loaded.get(index, {}).items():
                if only not in (None, key):
                    continue
                if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim == weight.ndim:
                    optimizer.state[weight][key] = value.to(weight.device, copy=True)
