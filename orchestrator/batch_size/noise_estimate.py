"""An estimate of the noise scale: the number, its interval, the verdict."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """An estimate of B_simple and what it rests on.

    Attributes:
        value: tr_s / g2 in the unit of the batch sizes observed; NaN where the interval has no upper end,
            since a
            ratio over a denominator that may be 0 says nothing.
        interval: (low, high) with the nominal coverage; high may be inf: "at least low".
        reliable: the interval is bounded and narrow enough to choose a batch size from.
        reason: why it is reliable, or why not and what would help; a sentence.
        g2: smoothed |G|^2, may be negative.
        tr_s: smoothed tr(Sigma).
        num_observations: steps that entered.
    """

    value: float
    interval: tuple[float, float]
    reliable: bool
    reason: str
    g2: float
    tr_s: float
    num_observations: int
