"""The batch size that a measured noise scale recommends."""

from __future__ import annotations

import dataclasses
import math

from orchestrator.batch_size.noise_estimate import NoiseScale


@dataclasses.dataclass(frozen=True)
class BatchAdvice:
    """A batch size, or None with what to do to get one.

    Attributes:
        batch: in the unit of the noise scale.
        reason: a sentence.
    """

    batch: int | None
    reason: str


def recommended_batch(estimate: NoiseScale, *, multiple_of: int = 1) -> BatchAdvice:
    """The largest batch of the perfect-scaling region: B_simple, rounded down.

    The result is the largest multiple_of * 2^k that is not above B_simple.

    Up to about B_simple doubling the batch nearly halves the steps; at it, training takes twice the least
    steps and twice the least examples; beyond, examples are wasted. B_simple stands for the critical batch
    size only
    roughly: it is 2 to 5 times larger for image models, and far smaller for language models trained with
        Adam, where trying a few batch sizes from one checkpoint is the arbiter.

    Args:
        estimate: from `NoiseScaleEstimator.estimate`.
        multiple_of: what the batch has to be a multiple of (workers times micro-batch), >= 1.

    Returns:
        No batch if the estimate is unreliable; `multiple_of` itself if the noise scale is below it.

    Raises:
        ValueError: multiple_of < 1.

    Reference: McCandlish et al., 2018, arXiv 1812.06162, equation 2.12; Shallue et al., 2019, JMLR 20(112).
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of!r}")
    low, high = estimate.interval
    if not estimate.reliable:
        known = f" (it is at least {low:.3g})" if low > 0 else ""
        return BatchAdvice(None, f"the noise scale is not known well enough{known}: {estimate.reason}")
    measured = f"noise scale {estimate.value:.4g} (between {low:.4g} and {high:.4g})"
    if estimate.value < multiple_of:
        return BatchAdvice(multiple_of, f"{measured} is below the smallest possible batch, {multiple_of}")
    batch = multiple_of * 2 ** math.floor(math.log2(estimate.value / multiple_of))
    return BatchAdvice(batch, f"{measured}, rounded down to {multiple_of} times a power of two")
