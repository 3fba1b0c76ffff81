"""The noise scale at fixed weights: gradients of random micro-batches, as many as the interval needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from orchestrator import randomness
from orchestrator.batch_size.coupled_examples import frozen_statistics
from orchestrator.batch_size.noise_scale import MicroBatchNoise, NoiseScale, NoiseScaleEstimator
from orchestrator.techniques.normalization import ALL_BATCH_NORMS
from planner.inputs.strict import WorkloadError

LossOf = Callable[[Tensor], Tensor]
"""Indices into the training set -> their mean loss."""
_FIRST_MICRO_BATCHES = 8
_MOST_MICRO_BATCHES = 512
_MIN_OBSERVATIONS = 10


def check_statistics(module: nn.Module) -> None:
    """Refuse batch norm whose running statistics are still those that it was made with.

    Raises:
        WorkloadError: such a layer is in training mode.
    """
    for name, part in module.named_modules():
        if not (isinstance(part, ALL_BATCH_NORMS) and part.training):
            continue
        if part.num_batches_tracked is None or int(part.num_batches_tracked) == 0:
            raise WorkloadError(
                f"the batch norm {name!r} couples the examples of a batch and has no running statistics to be "
                "frozen at. Measure from a checkpoint with --checkpoint, or set train.batch_norm to 'group_norm'."
            )


def measure_noise(
    module: nn.Module,
    loss_of: LossOf,
    *,
    num_samples: int,
    micro_batch: int,
    generator: torch.Generator,
    num_examples: int | None = None,
    deadline_s: float = math.inf,
    max_interval_ratio: float = 1.5,
) -> NoiseScale:
    """Observe gradients at the present weights until the interval is narrow, or time or examples are spent.

    Examples are drawn with replacement, so that they are independent, and |G| is that of the whole set. The big
    batch begins at 8 micro-batches and doubles while |G|^2 cannot be told from the noise in it, since examples
    spent on one large batch say more of |G|^2 than on several small ones. `.grad` is None afterwards; weights,
    batch-norm statistics and torch's generator are as before.

    Args:
        module: whose parameters' gradients are looked at.
        loss_of: mean loss of the samples of some indices.
        num_samples: of the training set.
        micro_batch: examples of a small batch.
        generator: of the draws.
        num_examples: spend about that many and no more; None for as many as it takes.
        deadline_s: of time.monotonic.
        max_interval_ratio: enough, once the interval's upper end is that many times its lower end.

    Raises:
        WorkloadError: batch norm without running statistics.
    """
    check_statistics(module)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    estimator = NoiseScaleEstimator(decay=1.0, min_observations=_MIN_OBSERVATIONS)
    count, spent = _FIRST_MICRO_BATCHES, 0
    if num_examples is not None:
        count = max(2, num_examples // (_MIN_OBSERVATIONS * micro_batch))
    probe = MicroBatchNoise(parameters)
    device = parameters[0].device
    state = randomness.capture_state(device)
    try:
        with frozen_statistics(module):
            while True:
                for _ in range(_MIN_OBSERVATIONS):
                    sizes = num_samples, micro_batch, count
                    if not _observe(estimator, probe, loss_of, parameters, sizes, generator, deadline_s):
                        return estimator.estimate()
                    spent += count * micro_batch
                estimate = estimator.estimate()
                low, high = estimate.interval
                if low > 0 and high <= max_interval_ratio * low:
                    return estimate
                if (
                    num_examples is not None
                    and spent + _MIN_OBSERVATIONS * count * micro_batch > num_examples
                ):
                    return estimate
                if not estimate.reliable and count < _MOST_MICRO_BATCHES and num_examples is None:
                    # What small batches said of |G|^2 would only add its noise.
                    count *= 2
                    estimator.reset()
    finally:
        probe.close()
        randomness.restore_state(state, device)
        for parameter in parameters:
            parameter.grad = None


def _observe(
    estimator: NoiseScaleEstimator,
    probe: MicroBatchNoise,
    loss_of: LossOf,
    parameters: list[nn.Parameter],
    sizes: tuple[int, int, int],
    generator: torch.Generator,
    deadline_s: float,
) -> bool:
    """One big batch of `count` micro-batches; False where the time was over before its end."""
    num_samples, micro_batch, count = sizes
    for parameter in parameters:
        parameter.grad = None
    for _ in range(count):
        if time.monotonic() >= deadline_s:
            return False
        indices = torch.randint(num_samples, (micro_batch,), generator=generator)
        (loss_of(indices) / count).backward()
    norms = probe.observation(num_micro_batches=count, loss_factor=1 / count)
    estimator.observe(
        small_sqnorm=float(norms.small_sqnorm),
        small_batch=micro_batch,
        big_sqnorm=float(norms.big_sqnorm),
        big_batch=count * micro_batch,
    )
    return True
