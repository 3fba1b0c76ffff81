"""How the rate changes with the batch: linearly for SGD and LARS, with the square root for Adam-like ones."""

from __future__ import annotations

import math
from typing import Literal

RateRule = Literal["linear", "square root", "none"]
# Whose step is proportional to the gradient (LARS: to its direction, with the same noise). All others divide by a
# running size of the gradient, so that noise enters with its standard deviation.
_LINEAR = frozenset({"sgd", "asgd", "lars"})


def rate_rule(optimizer: str) -> RateRule:
    """The rule of an optimizer by its name in a job.

    >>> rate_rule("sgd"), rate_rule("ranger_lars")
    ('linear', 'square root')

    Reference: Goyal et al., 2017, arXiv 1706.02677, section 2.1 (linear); You et al., 2020, arXiv 1904.00962,
        section 4 (square root, LAMB); Malladi et al., 2022, arXiv 2205.10287 (square root, Adam and RMSProp).
    """
    return "linear" if optimizer in _LINEAR else "square root"


def rate_factor_of(batch_factor: float, rule: RateRule) -> float:
    """Factor of the rate that keeps the noise of the steps where the batch grows by `batch_factor`.

        linear: f        square root: sqrt(f)        none: 1

    Raises:
        ValueError: batch_factor not positive.

    >>> rate_factor_of(4, "linear"), rate_factor_of(4, "square root")
    (4, 2.0)
    """
    if not batch_factor > 0:
        raise ValueError(f"the batch changes by a factor above 0, got {batch_factor!r}")
    if rule == "none":
        return 1.0
    return batch_factor if rule == "linear" else math.sqrt(batch_factor)
