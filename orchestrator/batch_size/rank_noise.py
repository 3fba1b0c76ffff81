"""Norms of the gradients of data-parallel ranks and of their mean, where DDP reduces them."""

# No `from __future__ import annotations` here: DDP compares a hook's annotations with the classes themselves.

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.batch_size.gradient_norms import GradientNorms, Grouping, gradient_norm, own_part, squares


class RankNoiseHook:
    """DDP communication hook: the usual average of gradients, and their norms before and after it.

    The small batch is what one rank has seen since its last reduction, the big batch that of all ranks. Ranks with
    unequally many examples stand for the sizes of `equivalent_batches` with equal weights. Before the reduction a
    rank reads all of its buckets, after it its own part of them; no copy of a gradient. The reduced gradients are
    those of DDP without a hook, bit for bit: it scales by 1 / world size, then sums. (With
    gradient_as_bucket_view *and* gradients zeroed in place DDP divides instead; on a world size that is no
    power of two the last bit may differ.) The scaling is a pass over the buckets that DDP without a hook does while
    it fills them, which is why `MicroBatchNoise` is the cheaper of the two on CPUs.

    Accumulating under `no_sync`, the hook runs in the last micro-batch only and sees the gradient accumulated
    by the rank: the small batch is then all of the rank's micro-batches of the step, and the gradients are
    those of the loss as it was scaled for accumulation, which makes them means if each loss was divided by
    their number.

    Args:
        parameters: of the model; None for all of them.
        groups: of parameters, measured apart as well; see `Grouping`.

    Example:
        hook = RankNoiseHook().attach(ddp_model); after each backward, observation().
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        groups: Sequence[Iterable[nn.Parameter]] = (),
    ) -> None:
        self._parameters = parameters
        self._groups = groups
        self._process_group: dist.ProcessGroup | None = None
        self._rank, self._world_size = 0, 1
        # Of each bucket: the numbers of its parameters and the norms of their gradients.
        self._own: dict[int, tuple[list[int], list[Tensor]]] = {}
        self._mean: dict[int, tuple[list[int], list[Tensor]]] = {}

    def attach(self, model: DistributedDataParallel) -> "RankNoiseHook":
        """Register with `model`, before its first backward; returns the hook. A model takes one hook only."""
        self._grouping = Grouping(
            model.parameters() if self._parameters is None else self._parameters, self._groups
        )
        self._number_of: dict[Tensor, int] = {
            parameter: number for number, parameter in enumerate(self._grouping.parameters)
        }
        self._process_group = model.process_group
        self._rank = dist.get_rank(self._process_group)
        self._world_size = dist.get_world_size(self._process_group)
        model.register_comm_hook(self, average_and_record)
        return self

    def own_observation(self, *, loss_factor: float = 1.0) -> GradientNorms:
        """Norms of the last step: of this rank's gradient, and of this rank's part of the averaged one.

        Average the small ones over the ranks and add up the big ones, along with the metrics of the step.

        Args:
            loss_factor: on the loss; the loss scale of mixed precision.

        Raises:
            RuntimeError: no backward has reduced gradients yet.
        """
        return GradientNorms(
            self._total(self._own) / loss_factor**2, self._total(self._mean) / loss_factor**2
        )

    def observation(self, *, loss_factor: float = 1.0) -> GradientNorms:
        """Norms of the last step of all ranks, by one all-reduce of a few numbers; raises as `own_observation`."""
        own = self.own_observation(loss_factor=loss_factor)
        both = torch.stack([own.small_by_group, own.big_by_group])
        dist.all_reduce(both, group=self._process_group)
        return GradientNorms(both[0] / self._world_size, both[1])

    def _total(self, buckets: dict[int, tuple[list[int], list[Tensor]]]) -> Tensor:
        if not buckets:
            raise RuntimeError(
                "no gradients have been reduced yet: attach the hook, then run forward and backward"
            )
        # In the order of the buckets, whatever order the reductions ended in.
        numbers = [number for index in sorted(buckets) for number in buckets[index][0]]
        norms = [norm for index in sorted(buckets) for norm in buckets[index][1]]
        device = norms[0].device
        for norm in norms:
            if norm.is_cuda:
                # Made on the stream of the reduction, read on this one.
                norm.record_stream(torch.cuda.current_stream(norm.device))
        by_parameter = torch.zeros(len(self._grouping.parameters), dtype=torch.float64, device=device)
        by_parameter[numbers] = squares(norms)
        return self._grouping.add_up(by_parameter)

    def before(self, index: int, numbers: list[int], gradients: list[Tensor]) -> None:
        """Record a bucket of this rank's gradients; bucket 0 begins a step."""
        if index == 0:
            self._own.clear()
            self._mean.clear()
        self._own[index] = numbers, [gradient_norm(gradient) for gradient in gradients]

    def after(self, index: int, numbers: list[int], gradients: list[Tensor]) -> None:
        """Record this rank's part of a bucket of averaged gradients."""
        parts = [own_part(gradient, self._rank, self._world_size) for gradient in gradients]
        self._mean[index] = numbers, [gradient_norm(part) for part in parts]

    def numbered(self, bucket: dist.GradBucket) -> tuple[list[int], list[Tensor]]:
        """The parameters of a bucket that count, by number, and their gradients: views of its buffer."""
        pairs = [
            (self._number_of[parameter], gradient)
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients())
            if parameter in self._number_of
        ]
        return [number for number, _ in pairs], [gradient for _, gradient in pairs]


def average_and_record(state: RankNoiseHook, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook itself: record, scale by 1 / world size, sum over ranks, record."""
    group, index, buffer = state._process_group, bucket.index(), bucket.buffer()
    numbers, gradients = state.numbered(bucket)
    state.before(index, numbers, gradients)
    buffer.mul_(1.0 / dist.get_world_size(group))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    assert work is not None, "this rank is not in the process group of its model"

    def record(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        averaged = future.value()[0]
        assert averaged.data_ptr() == buffer.data_ptr(), "reduced in place"
        state.after(index, numbers, gradients)
        return averaged

    return work.get_future().then(record)
