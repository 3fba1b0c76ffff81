"""Norms of small- and big-batch gradients, measured while training: across ranks, or across micro-batches."""

# No `from __future__ import annotations` here: DDP compares a hook's annotations with the classes themselves.

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """What one step says about the noise, for `NoiseScaleEstimator.observe`; 0-dim float64 tensors.

    Attributes:
        small_sqnorm: mean squared norm of the small-batch gradients.
        big_sqnorm: squared norm of their mean.
    """

    small_sqnorm: Tensor
    big_sqnorm: Tensor


def squared_norm(tensor: Tensor) -> Tensor:
    """Squared L2 norm as a 0-dim float64 tensor on the same device; 16-bit tensors accumulate in float32."""
    is_16_bit = tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.linalg.vector_norm(tensor, dtype=torch.float32 if is_16_bit else None).double().square()


class RankNoiseHook:
    """DDP communication hook: the usual average of gradients, and their norms before and after it.

    The small batch is what one rank has seen since its last reduction, the big batch that of all ranks, so
    ranks must have equally many examples. Two reads of each bucket, no copy of a gradient. The reduced
    gradients are those of DDP without a hook, bit for bit: it scales by 1 / world size, then sums. (With
    gradient_as_bucket_view *and* gradients zeroed in place DDP divides instead; on a world size that is no
    power of two the last bit may differ.)

    Accumulating under `no_sync`, the hook runs in the last micro-batch only and sees the gradient accumulated
    by the rank: the small batch is then all of the rank's micro-batches of the step, and the gradients are
    those of the loss as it was scaled for accumulation, which makes them means if each loss was divided by
    their number.

    Example:
        hook = RankNoiseHook().attach(ddp_model); after each backward, observation().
    """

    def __init__(self) -> None:
        self._process_group: dist.ProcessGroup | None = None
        self._local: dict[int, Tensor] = {}
        self._mean: dict[int, Tensor] = {}

    def attach(self, model: DistributedDataParallel) -> "RankNoiseHook":
        """Register with `model`, before its first backward; returns the hook. A model takes one hook only."""
        self._process_group = model.process_group
        model.register_comm_hook(self, average_and_record)
        return self

    @property
    def local_sqnorm(self) -> Tensor:
        """Squared norm of this rank's gradient in the last step, before the average.

        Its mean over ranks is the small_sqnorm: average it along with the metrics of the step, or call
        `observation`.

        Raises:
            RuntimeError: no backward has reduced gradients yet.
        """
        return self._total(self._local)

    @property
    def mean_sqnorm(self) -> Tensor:
        """Squared norm of the averaged gradient of the last step, the big_sqnorm; alike on all ranks.

        Raises:
            RuntimeError: no backward has reduced gradients yet.
        """
        return self._total(self._mean)

    def observation(self) -> GradientNorms:
        """Norms of the last step, the small one averaged over ranks by one all-reduce of a scalar.

        Raises:
            RuntimeError: no backward has reduced gradients yet.
        """
        small = self.local_sqnorm.clone()
        dist.all_reduce(small, group=self._process_group)
        return GradientNorms(small / dist.get_world_size(self._process_group), self.mean_sqnorm)

    @staticmethod
    def _total(norms: dict[int, Tensor]) -> Tensor:
        if not norms:
            raise RuntimeError(
                "no gradients have been reduced yet: attach the hook, then run forward and backward"
            )
        # In the order of the buckets, whatever order the reductions ended in: alike on all ranks.
        buckets = [norms[index] for index in sorted(norms)]
        for norm in buckets:
            if norm.is_cuda:
                # Made on the stream of the reduction, read on this one.
                norm.record_stream(torch.cuda.current_stream(norm.device))
        return torch.stack(buckets).sum()

    def before(self, bucket: int, gradients: Tensor) -> None:
        """Record a bucket of this rank's gradients; bucket 0 begins a step."""
        if bucket == 0:
            self._local.clear()
            self._mean.clear()
        self._local[bucket] = squared_norm(gradients)

    def after(self, bucket: int, gradients: Tensor) -> None:
        """Record a bucket of averaged gradients."""
        self._mean[bucket] = squared_norm(gradients)


def average_and_record(state: RankNoiseHook, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook itself: record, scale by 1 / world size, sum over ranks, record."""
    group, index, gradients = state._process_group, bucket.index(), bucket.buffer()
    state.before(index, gradients)
    gradients.mul_(1.0 / dist.get_world_size(group))
    work = dist.all_reduce(gradients, group=group, async_op=True)
    assert work is not None, "this rank is not in the process group of its model"

    def record(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        averaged = future.value()[0]
        state.after(index, averaged)
        return averaged

    return work.get_future().then(record)


class MicroBatchNoise:
    """Norms of the micro-batch gradients of one worker that accumulates, without a copy of a gradient.

    A hook on each parameter reads the gradient of a micro-batch before autograd adds it to `.grad`. Cost: one
    read of every gradient and one small kernel per parameter and micro-batch, one read of `.grad` per step.
    Norms are summed per device; nothing is synchronized. For whole parameters: not for sharded or sparse
    ones. Under DDP the micro-batch norms are this rank's (average them over ranks) and `.grad` is the mean of
    all ranks: the big batch is then that of all ranks.

    Args:
        parameters: of the model; each counts once, frozen ones do not.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        self._sums: dict[torch.device, Tensor] = {}
        self._handles: list[Any] = [p.register_hook(self._record) for p in self._parameters]

    @torch.no_grad()
    def _record(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise ValueError(
                "the noise scale needs dense gradients; got a sparse one (nn.Embedding: sparse=False)"
            )
        norm = squared_norm(gradient)
        if gradient.device in self._sums:
            self._sums[gradient.device].add_(norm)
        else:
            self._sums[gradient.device] = norm

    @torch.no_grad()
    def observation(self, *, num_micro_batches: int, loss_factor: float) -> GradientNorms:
        """Norms since the last call; call it after the last micro-batch, before clipping or `zero_grad`.

        With c the factor on each loss and h_i = c g_i the gradients that the hooks saw, .grad = sum_i h_i:

            small_sqnorm = sum_i |h_i|^2 / (k c^2)        big_sqnorm = |.grad|^2 / (k c)^2

        Args:
            num_micro_batches: k, since `.grad` was zeroed.
            loss_factor: c; 1/k where each loss was divided by the number of micro-batches, 1 where not, times
                the loss scale of mixed precision if `.grad` is still scaled.

        Raises:
            ValueError: num_micro_batches < 1, or loss_factor not positive.
            RuntimeError: no gradient came since the last call.
        """
        if num_micro_batches < 1 or not loss_factor > 0:
            raise ValueError(
                f"need num_micro_batches >= 1 and loss_factor > 0, got {num_micro_batches!r}, {loss_factor!r}"
            )
        if not self._sums:
            raise RuntimeError("no gradients have come since the last observation: run backward first")
        sums = list(self._sums.values())
        self._sums = {}
        target = sums[0].device
        squares = torch.stack([norm.to(target) for norm in sums]).sum()
        norms = [squared_norm(p.grad).to(target) for p in self._parameters if p.grad is not None]
        return GradientNorms(
            squares / (num_micro_batches * loss_factor**2),
            torch.stack(norms).sum() / (num_micro_batches * loss_factor) ** 2,
        )

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
