"""Norms of small- and big-batch gradients where FSDP2 reduces them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from orchestrator.batch_size.noise_probes import squared_norm


class ShardNoise:
    """FSDP2's reduction of gradients, unchanged, with their norms before and after it.

    Before the reduction a rank has its own whole gradient of a unit, after it a share of the mean. The small
    batch is what one rank has seen since its last reduction, the big batch that of all ranks:

        small_sqnorm = mean over ranks of the sum over units of |own gradient|^2
        big_sqnorm = sum over ranks and units of |share of the mean|^2

    Two reads of each unit's gradient, no copy. FSDP2 divides by the world size within the reduction for float32 and
    bfloat16; where it scales by other factors (float16) nothing is recorded.
    """

    def __init__(self) -> None:
        self._small: list[Tensor] = []
        self._share: list[Tensor] = []

    def attach(self, module: nn.Module) -> ShardNoise:
        """Take the place of the reduction of every unit of a module, before its first backward."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_custom_reduce_scatter(_Recording(self))  # pyright: ignore[reportArgumentType]
        return self

    def record(self, own: list[Tensor], share: Tensor) -> None:
        """Take in the squared norm of a unit's own gradient, and its share of the mean."""
        self._small += own
        self._share.append(squared_norm(share))

    def local_norms(self) -> list[float]:
        """[small_sqnorm of this rank, its part of big_sqnorm] since the last call; zeros where nothing came."""
        small, share, self._small, self._share = self._small, self._share, [], []
        if not small:
            return [0.0, 0.0]
        return [float(torch.stack(small).sum()), float(torch.stack(share).sum())]


class _Recording:
    """torch's own reduction, recorded."""

    def __init__(self, noise: ShardNoise) -> None:
        self._noise = noise

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of the reduction."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Reduce; FSDP2 asks for it in order, on its own stream."""
        is_mean = op == dist.ReduceOp.AVG
        own = [squared_norm(input_tensor)] if is_mean else []
        work = dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        if is_mean:
            if work is not None:
                work.wait()
            self._noise.record(own, output_tensor)
        return work
