"""The gradient noise of a run, from whichever gradients of different batch sizes its steps have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.batch_size.coupled_examples import coupling_layers, refusal
from orchestrator.batch_size.micro_batch_noise import MicroBatchNoise
from orchestrator.batch_size.noise_scale import (
    BatchAdvice,
    NoiseScale,
    NoiseScaleEstimator,
    recommended_batch,
)
from orchestrator.batch_size.shard_noise import ShardNoise
from orchestrator.data import BatchLayout
from orchestrator.sharding import is_sharded

# Observations before the measuring becomes sparse: three times what an estimate needs at least.
_DENSE = 60
# Averages over 199 observations; over 66 where the batch follows, since noise that grows is seen late.
_DECAY, _FOLLOWED_DECAY = 0.99, 0.97


class NoiseMeasurement:
    """Measures and smooths the noise scale of a run, in samples: of the whole model and of parameter groups.

    The gradient of every micro-batch of every rank is compared with that of the step. One rank without
    accumulation has only one gradient a step, and the estimate says so; so it does where batch norm couples the
    samples of a micro-batch.

    The first `_DENSE` steps are measured, all of them, then one in `every`: the noise changes slowly, and the norms
    of a step cost a read of its gradients.

    Args:
        module: of the step, in its training mode, before its first forward; wrapped for data parallelism or sharded
            if ranks are several.
        layout: of the global batch; that of a step may have another accumulation.
        groups: of parameters, such as those of the optimizer, measured apart as well.
        every: steps between two measurements, once there are enough.
        is_followed: the batch follows the estimate: every step is measured, the estimate looks back a third as far,
            and one rank alone is measured too, whose accumulation may grow.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: BatchLayout,
        *,
        groups: Sequence[Iterable[nn.Parameter]] = (),
        every: int = 1,
        is_followed: bool = False,
    ) -> None:
        self._layout = layout
        self._every, self._waited = 1 if is_followed else every, 0
        self._is_measured = True
        self._micro: MicroBatchNoise | None = None
        self._shards: ShardNoise | None = None
        self._part = 0, 1
        coupled = coupling_layers(module)
        self._refusal = refusal(coupled) if coupled else ""
        self._num_groups = max(1, len(groups))
        decay = _FOLLOWED_DECAY if is_followed else _DECAY
        self._whole = NoiseScaleEstimator(decay=decay)
        self._by_group = [NoiseScaleEstimator(decay=decay) for _ in groups]
        if coupled:
            pass
        elif is_sharded(module):
            self._shards = ShardNoise(module, groups=groups)
        elif layout.accumulation > 1 or is_followed or isinstance(module, DistributedDataParallel):
            self._micro = MicroBatchNoise(module.parameters(), groups=groups)
            if isinstance(module, DistributedDataParallel):
                self._part = dist.get_rank(module.process_group), dist.get_world_size(module.process_group)

    def begin_step(self, layout: BatchLayout) -> None:
        """Before the first forward of a step: how its batch is cut, and whether it is measured."""
        self._layout = layout
        enough = self._whole.num_observations >= _DENSE
        self._is_measured = not enough or self._waited + 1 >= self._every
        self._waited = 0 if self._is_measured else self._waited + 1
        for source in (self._micro, self._shards):
            if source is not None:
                source.pause(is_paused=not self._is_measured)

    def local_norms(self) -> list[float]:
        """This rank's mean squared norms of micro-batch gradients, group by group, then its parts of the step's.

        Before clipping. Always of the same length; 0 where nothing is measured.
        """
        rank, world_size = self._part
        count = self._layout.num_micro_batches(rank)
        if not self._is_measured:
            return [0.0] * (2 * self._num_groups)
        if self._micro is not None:
            norms = self._micro.observation(
                num_micro_batches=count, loss_factor=1 / count, rank=rank, world_size=world_size
            )
        elif self._shards is not None:
            norms = self._shards.observation(num_micro_batches=count, loss_factor=1 / count)
        else:
            return [0.0] * (2 * self._num_groups)
        # Parameters of no group are a last one, which counts in the whole only.
        small, big = norms.small_by_group.tolist(), norms.big_by_group.tolist()
        # Where ranks have unequally many, the loss was divided by their mean and not by this rank's number.
        weight = (count / self._layout.mean_micro_batches) ** 2
        return [*(square / weight for square in small), *big]

    def observe(self, norms_by_rank: list[list[float]]) -> NoiseScale:
        """Take in a step's norms of all ranks, as `local_norms` returns them; the estimate so far."""
        if not self._is_measured:
            return self.estimate()
        half = len(norms_by_rank[0]) // 2
        small = [sum(norms[k] for norms in norms_by_rank) / len(norms_by_rank) for k in range(half)]
        big = [sum(norms[half + k] for norms in norms_by_rank) for k in range(half)]
        has_pair = self._micro is not None or self._shards is not None
        sizes = {
            "small_batch": self._layout.micro_batch if has_pair else self._layout.global_batch,
            "big_batch": self._layout.global_batch,
        }
        self._whole.observe(small_sqnorm=sum(small), big_sqnorm=sum(big), **sizes)
        for estimator, own_small, own_big in zip(self._by_group, small, big):
            estimator.observe(small_sqnorm=own_small, big_sqnorm=own_big, **sizes)
        return self.estimate()

    def estimate(self) -> NoiseScale:
        """Of the whole model."""
        return self._refused() if self._refusal else self._whole.estimate()

    def by_group(self) -> list[NoiseScale]:
        """Of each parameter group, in their order."""
        return [self._refused() if self._refusal else group.estimate() for group in self._by_group]

    def _refused(self) -> NoiseScale:
        return NoiseScale(math.nan, (0.0, math.inf), False, self._refusal, math.nan, math.nan, 0)

    def forget(self) -> None:
        """Begin anew: gradients before the end of the warm-up are of another scale and would hide the others."""
        for estimator in (self._whole, *self._by_group):
            estimator.reset()

    def advice(self) -> BatchAdvice:
        """The batch size that the estimate so far recommends, in whole micro-batches of all ranks."""
        unit = self._layout.micro_batch * self._layout.world_size
        return recommended_batch(self.estimate(), multiple_of=unit)

    def state_dict(self) -> dict[str, Any]:
        """The statistics so far, as plain numbers that mean the same for any number of ranks and micro-batches."""
        return {
            "whole": self._whole.state_dict(),
            "by_group": [group.state_dict() for group in self._by_group],
            "waited": self._waited,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: keys are missing or unknown, or there are other groups.
        """
        if state_dict.keys() - {"waited"} != {"whole", "by_group"} or len(state_dict["by_group"]) != len(
            self._by_group
        ):
            raise ValueError(
                f"need the statistics of the whole and of {len(self._by_group)} groups, got {state_dict!r}"
            )
        self._waited = state_dict.get("waited", 0)
        self._whole.load_state_dict(state_dict["whole"])
        for group, state in zip(self._by_group, state_dict["by_group"]):
            group.load_state_dict(state)
