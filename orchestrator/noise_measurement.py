"""The gradient noise of a run, from whichever gradients of different batch sizes its steps have."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.batch_size.noise_scale import (
    BatchAdvice,
    MicroBatchNoise,
    NoiseScale,
    NoiseScaleEstimator,
    RankNoiseHook,
    recommended_batch,
)
from orchestrator.batch_size.shard_noise import ShardNoise
from orchestrator.data import BatchLayout
from orchestrator.sharding import is_sharded


class NoiseMeasurement:
    """Measures and smooths the noise scale of a run, in samples.

    Accumulating ranks compare each micro-batch's gradient with that of the step; ranks that do not accumulate
    compare their own with that of the step, and so do ranks that share a model (FSDP2), where the gradients of
    micro-batches are never seen one by one. One rank without accumulation has only one gradient a step, and
    the estimate says so.

    Args:
        module: of the step, before its first backward; wrapped for data parallelism or sharded if ranks are
            several.
        layout: of the global batch.
    """

    def __init__(self, module: nn.Module, layout: BatchLayout) -> None:
        self._layout = layout
        self._estimator = NoiseScaleEstimator()
        self._micro: MicroBatchNoise | None = None
        self._ranks: RankNoiseHook | None = None
        self._shards: ShardNoise | None = None
        if is_sharded(module):
            self._shards = ShardNoise().attach(module)
        elif layout.accumulation > 1:
            self._micro = MicroBatchNoise(module.parameters())
        elif isinstance(module, DistributedDataParallel):
            self._ranks = RankNoiseHook().attach(module)

    def local_norms(self) -> list[float]:
        """[mean squared norm of this rank's small gradients, squared norm of the step's], before clipping.

        Of a shared model the second is that of this rank's share.
        """
        if self._micro is not None:
            count = self._layout.accumulation
            norms = self._micro.observation(num_micro_batches=count, loss_factor=1 / count)
            return [float(norms.small_sqnorm), float(norms.big_sqnorm)]
        if self._ranks is not None:
            return [float(self._ranks.local_sqnorm), float(self._ranks.mean_sqnorm)]
        if self._shards is not None:
            return self._shards.local_norms()
        return [0.0, 0.0]

    def observe(self, norms_by_rank: list[list[float]]) -> NoiseScale:
        """Take in a step's norms of all ranks, as `local_norms` returns them; the estimate so far."""
        small = sum(norms[0] for norms in norms_by_rank) / len(norms_by_rank)
        layout = self._layout
        small_batch = layout.global_batch
        if self._micro is not None:
            small_batch = layout.micro_batch
        elif self._ranks is not None or self._shards is not None:
            small_batch = layout.global_batch // layout.world_size
        shares = norms_by_rank[:1] if self._shards is None else norms_by_rank
        self._estimator.observe(
            small_sqnorm=small,
            small_batch=small_batch,
            big_sqnorm=sum(norms[1] for norms in shares),
            big_batch=layout.global_batch,
        )
        return self._estimator.estimate()

    def forget(self) -> None:
        """Begin anew: gradients before the end of the warm-up are of another scale and would hide the others."""
        self._estimator.reset()

    def advice(self) -> BatchAdvice:
        """The batch size that the estimate so far recommends, in whole micro-batches of all ranks."""
        unit = self._layout.micro_batch * self._layout.world_size
        return recommended_batch(self._estimator.estimate(), multiple_of=unit)

    def state_dict(self) -> dict[str, Any]:
        """The statistics so far, as plain numbers."""
        return self._estimator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from `state_dict`."""
        self._estimator.load_state_dict(state_dict)
