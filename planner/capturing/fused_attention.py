"""Attention as one kernel where it is traced on a processor for a device that has such a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_DROPOUT = 4  # position in the arguments, after query, key, value, attn_mask


class FusedAttention(TorchFunctionMode):
    """While it is active, attention is traced without its dropout.

    On the CPU torch has a fused kernel for attention without dropout alone; with it, the trace holds products, a
    softmax and the scores of every head, which GPUs never write to memory: their kernels draw the mask on the way.
    What is traced on the CPU to be priced for a GPU leaves it out. Such a graph is for prices, not for execution.

    Reference: Dao et al., 2022, FlashAttention, arXiv 2205.14135, section 3.1.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function; attention without dropout."""
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            named.pop("dropout_p", None)
            if len(args) > _DROPOUT:
                args = (*args[:_DROPOUT], 0.0, *args[_DROPOUT + 1 :])
        return func(*args, **named)
