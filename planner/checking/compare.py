"""What two runs of one step left behind, compared: bit for bit, and by how far they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from planner.checking.real_step import Left


def first_difference(eager: Left, planned: Left) -> dict[str, str]:
    """For "outputs", "gradients" and "buffers" the first that is not equal bit for bit, "" where all are.

    A gradient that one side lacks is a difference. Of the outputs only those that the planned module returns are
    compared: it has None in place of what is no tensor.
    """
    outputs = {path: tensor for path, tensor in eager.outputs.items() if path in planned.outputs}
    return {
        "outputs": _different(
            {"the loss": eager.loss, **outputs}, {"the loss": planned.loss, **planned.outputs}
        ),
        "gradients": _different(eager.gradients, planned.gradients),
        "buffers": _different(
            {**eager.buffers, "the random generator": eager.random_state},
            {**planned.buffers, "the random generator": planned.random_state},
        ),
    }


def largest_difference(eager: Left, planned: Left) -> dict[str, float]:
    """For "outputs", "gradients" and "buffers" the largest absolute difference over the largest absolute number.

    The numbers are those of all tensors of a kind together: a gradient that is zero but for rounding, such as that
    of a bias before batch norm, does not count by itself. Infinite where a tensor is missing or has another shape.
    """
    return {
        "outputs": max(
            _difference({"": eager.loss}, {"": planned.loss}), _difference(eager.outputs, planned.outputs)
        ),
        "gradients": _difference(eager.gradients, planned.gradients),
        "buffers": _difference(eager.buffers, planned.buffers),
    }


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and values; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _different(eager: dict[str, Any], planned: dict[str, Any]) -> str:
    if eager.keys() != planned.keys():
        return str(sorted(eager.keys() ^ planned.keys())[0])
    for name, a in eager.items():
        b = planned[name]
        if (a is None) != (b is None) or (a is not None and not equal_bits(a, b)):
            return name
    return ""


def _difference(eager: Mapping[str, Any], planned: Mapping[str, Any]) -> float:
    most, scale = 0.0, 0.0
    for name in eager.keys() & planned.keys():
        a, b = eager[name], planned[name]
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape != b.shape:
            return math.inf
        if not a.numel() or equal_bits(a, b):
            scale = max(scale, float(a.abs().max())) if a.numel() and a.isfinite().all() else scale
            continue
        a, b = a.double(), b.double()
        most = max(most, float((a - b).abs().nan_to_num(nan=math.inf).max()))
        scale = max(scale, float(a.abs().max()))
    return most / scale if scale else most
