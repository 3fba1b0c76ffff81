"""Norms of one tensor (a layer) and their ratio, kept on the device."""

import torch
from torch import Tensor


def layer_norm(tensor: Tensor) -> Tensor:
    """L2 norm of all elements as a 0-dim tensor; 16-bit tensors accumulate and answer in float32."""
    is_16_bit = tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.linalg.vector_norm(tensor, dtype=torch.float32 if is_16_bit else None)


def trust_ratio(weight: Tensor, update: Tensor, *, largest: float | None = None) -> Tensor:
    """||weight|| / ||update|| as a 0-dim tensor, and 1 where one of the norms is 0; ||weight|| <= `largest`.

    A layer whose weights or whose update are all 0 has no scale of its own: it takes the step unadapted. The
    choice is made on the device (torch.where), so nothing waits for it.

    Reference: You et al., 2020, arXiv 1904.00962, algorithm 2, with phi the identity.
    """
    weight_norm, update_norm = layer_norm(weight), layer_norm(update)
    if largest is not None:
        weight_norm = weight_norm.clamp(max=largest)
    ratio = weight_norm / update_norm
    is_adapted = (weight_norm > 0) & (update_norm > 0)
    return torch.where(is_adapted, ratio, torch.ones_like(ratio))
