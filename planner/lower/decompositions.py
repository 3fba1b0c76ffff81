"""Which operators are taken apart for the executor inductor: those whose parts it fuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

_ATEN = torch.ops.aten
# Besides pointwise operators: those that are pointwise operations and reductions one after the other.
_TAKEN_APART = re.compile(
    r"(_native|native|_batch|batch|cudnn_batch|miopen_batch|_fused_rms)_\w*norm\w*|_?(log_|safe_)?softmax(_backward_data)?|"
    r"_to_copy|l1_loss|mse_loss\w*|smooth_l1_loss\w*|huber_loss\w*|binary_cross_entropy\w*|soft_margin_loss\w*|"
    r"tril|triu|native_dropout_backward|logsumexp|(zeros|ones|full)_like|new_(zeros|ones|full)|zeros|ones|std|std_mean"
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator -> its parts, for those that inductor fuses the parts of; all others are called as they are.

    What draws random numbers stays whole, and so does what inductor takes apart into scattered writes.
    """
    # Here, not above: the code generator takes a second to load, and most plans do without.
    from torch._inductor.decomposition import select_decomp_table

    table = {
        operator: function
        for operator, function in select_decomp_table().items()
        if _is_taken_apart(operator)
    }
    table[_ATEN.nll_loss_backward.default] = _nll_loss_backward
    return table


def _is_taken_apart(operator: Any) -> bool:
    tags = getattr(operator, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(operator, torch._ops.OpOverload):
        return False
    name = operator._schema.name.removeprefix("aten::")
    return torch.Tag.pointwise in tags or _TAKEN_APART.fullmatch(name) is not None


def _nll_loss_backward(
    grad: torch.Tensor,
    inputs: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the negative log likelihood, element by element: -1 where the class is the target."""
    if inputs.dim() != 2 or weight is not None:
        return NotImplemented
    if reduction == 1:
        grad = grad / total_weight
    classes = torch.arange(inputs.shape[1], device=inputs.device)
    rows = torch.where(target == ignore_index, 0, -grad)
    return torch.where(classes == target.unsqueeze(1), rows.unsqueeze(1), 0).to(inputs.dtype)
