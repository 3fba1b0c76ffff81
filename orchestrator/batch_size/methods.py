"""What the noise scale, the sweep and branched training say of the critical batch, and where they disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

# B_simple is 1 to 6 times B_crit where it can be trusted: 2 to 5 in McCandlish et al., 2018, table 1.
MOST_SIMPLE_TO_CRITICAL = 6.0
# Ranges this near to one another agree: batch sizes are tried in factors of two.
_SLACK = 2.0


@dataclass(frozen=True)
class Method:
    """A range of critical batch sizes by one method.

    Attributes:
        name: of the method, for a sentence.
        low: in examples.
        high: inf for no bound.
        weight: the method of the largest weight is believed.
        says: what was measured, for a sentence.
    """

    name: str
    low: float
    high: float
    weight: int
    says: str


def noise_method(low: float, high: float, *, where: str) -> Method:
    """The critical batches that go with an interval of B_simple.

    Reference: McCandlish et al., 2018, arXiv 1812.06162, table 1.
    """
    says = f"B_simple {_range(low, high)} {where}"
    return Method("the noise scale", low / MOST_SIMPLE_TO_CRITICAL, high, 1, says)


def sweep_method(low: float, high: float) -> Method:
    """The interval of B_crit as fitted."""
    return Method("the sweep", low, high, 3, f"B_crit {_range(low, high)}")


def branched_method(
    low: float, high: float, *, batch: int, factor: int, rate: float, best_rate: float | None
) -> Method:
    """The critical batches that go with the largest batch that loses nothing; see `implied_critical_batch`.

    They rest on a rate that is the best of its batch. One that is far below it can be raised with the batch for
    longer, whatever the noise: then the sweep, where there is one, is believed.

    Args:
        low: from the largest factor that loses nothing.
        high: from the smallest that may lose; inf where there is none.
        batch: of factor 1.
        factor: the largest that loses nothing.
        rate: of factor 1.
        best_rate: at that batch by a sweep; None without one.
    """
    says = f"{factor} times {batch} loses nothing"
    if best_rate is not None and rate * _SLACK < best_rate:
        says += f", but from the rate {rate:.3g} on, far below the sweep's best of about {best_rate:.3g}"
        return Method("branched training", low, high, 2, says)
    return Method("branched training", low, high, 4, says)


def disagreements(methods: Sequence[Method], *, adaptive: bool) -> list[str]:
    """A sentence for each pair whose ranges are more than a factor of two apart.

    Args:
        methods: those that have an answer.
        adaptive: the optimizer is Adam-like, for which the noise scale is known to say too little.
    """
    sentences = []
    believed = max(methods, key=lambda method: method.weight, default=None)
    for one, other in itertools.combinations(sorted(methods, key=lambda method: method.weight), 2):
        lower, upper = (one, other) if one.high <= other.high else (other, one)
        if lower.high * _SLACK >= upper.low:
            continue
        apart = upper.low / lower.high
        trust = f"Believe {believed.name}" if believed is not None else ""
        if one.weight == 1 and adaptive and lower is one:
            trust += ": for Adam-like optimizers the noise scale is too small, by orders of magnitude"
        sentences.append(
            f"{one.name} and {other.name} disagree by a factor of {apart:.3g} or more ({one.says}; {other.says}). "
            f"{trust}."
        )
    return sentences


def _range(low: float, high: float) -> str:
    return f"at least {low:.4g}" if math.isinf(high) else f"{low:.4g} to {high:.4g}"
