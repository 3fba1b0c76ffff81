"""Exponentially weighted means of two correlated series, and Fieller's interval for their ratio."""

from __future__ import annotations

import dataclasses
import math
import statistics


@dataclasses.dataclass
class PairMoments:
    """Weighted means and covariances of pairs (numerator, denominator), the latest pair with weight 1.

    The weights decay^age are divided by their sum, so the means are bias-corrected exponential averages. All
    fields are plain numbers: `dataclasses.asdict` is the whole state.

    Attributes:
        count: pairs so far.
        weight: sum of decay^age.
        weight_sq: sum of decay^(2 age).
        numerator: weighted mean.
        denominator: weighted mean.
        numerator_sq: weighted sum of squared deviations.
        denominator_sq: the same.
        cross: weighted sum of products of deviations.

    Reference: West, 1979, Commun. ACM 22(9) (the stable one-pass update).
    """

    count: int = 0
    weight: float = 0.0
    weight_sq: float = 0.0
    numerator: float = 0.0
    denominator: float = 0.0
    numerator_sq: float = 0.0
    denominator_sq: float = 0.0
    cross: float = 0.0

    def add(self, numerator: float, denominator: float, *, decay: float) -> None:
        """Age what is there by one step and take in a pair."""
        self.count += 1
        self.weight = decay * self.weight + 1.0
        self.weight_sq = decay**2 * self.weight_sq + 1.0
        from_numerator, from_denominator = numerator - self.numerator, denominator - self.denominator
        self.numerator += from_numerator / self.weight
        self.denominator += from_denominator / self.weight
        self.numerator_sq = decay * self.numerator_sq + from_numerator * (numerator - self.numerator)
        to_denominator = denominator - self.denominator
        self.denominator_sq = decay * self.denominator_sq + from_denominator * to_denominator
        self.cross = decay * self.cross + from_numerator * to_denominator

    @property
    def num_effective(self) -> float:
        """Equally weighted pairs whose mean would vary as much: (sum w)^2 / sum w^2; 0 without any."""
        return self.weight**2 / self.weight_sq if self.count else 0.0

    @property
    def variance_scale(self) -> float:
        """What turns a sum of squared deviations into the variance of the mean; needs two pairs."""
        share = self.weight_sq / self.weight**2
        return share / (1.0 - share) / self.weight

    def quantile(self, confidence: float) -> float:
        """Two-sided quantile of Student's t at `num_effective` - 1 degrees of freedom."""
        return student_t_quantile(0.5 + confidence / 2, self.num_effective - 1)

    def denominator_error(self, confidence: float) -> float:
        """Half-width of the confidence interval of the denominator's mean alone."""
        return self.quantile(confidence) * math.sqrt(self.denominator_sq * self.variance_scale)

    def numerator_error(self, confidence: float) -> float:
        """The same of the numerator's mean alone."""
        return self.quantile(confidence) * math.sqrt(self.numerator_sq * self.variance_scale)

    def ratio_interval(self, confidence: float) -> tuple[float, float]:
        """Fieller's interval for the ratio of the means; see `fieller_interval`."""
        scale = self.variance_scale
        return fieller_interval(
            self.numerator,
            self.denominator,
            var_numerator=self.numerator_sq * scale,
            var_denominator=self.denominator_sq * scale,
            covariance=self.cross * scale,
            quantile=self.quantile(confidence),
        )


def fieller_interval(
    numerator: float,
    denominator: float,
    *,
    var_numerator: float,
    var_denominator: float,
    covariance: float,
    quantile: float,
) -> tuple[float, float]:
    """Confidence set of a ratio >= 0 of two means a / b, as (low, high); high may be inf.

    All theta that a test of "E a - theta E b = 0" does not reject:

        (a - theta b)^2 <= q^2 (var_a - 2 theta cov + theta^2 var_b)
        A theta^2 - 2 H theta + C <= 0,   A = b^2 - q^2 var_b,  H = a b - q^2 cov,  C = a^2 - q^2 var_a

    It is bounded only where b differs from 0 by more than q standard errors (A > 0, b > 0). Otherwise all
    ratios above some bound are possible: high = inf, low = 0 if a cannot be told from 0 either. Unlike the
    delta method, the set keeps its coverage when b is near 0.

    Args:
        numerator: a.
        denominator: b.
        var_numerator: variance of a, the mean, not of an observation.
        var_denominator: variance of b.
        covariance: of a and b.
        quantile: q.

    Returns:
        The set's part in [0, inf).

    >>> [round(x, 3) for x in fieller_interval(
    ...     2.0, 1.0, var_numerator=0.0, var_denominator=0.01, covariance=0.0, quantile=2.0)]
    [1.667, 2.5]

    Reference: Fieller, 1954, J. R. Stat. Soc. B 16(2), pages 175-185.
    """
    a_coefficient = denominator**2 - quantile**2 * var_denominator
    half = numerator * denominator - quantile**2 * covariance
    constant = numerator**2 - quantile**2 * var_numerator
    root = math.sqrt(max(0.0, half**2 - a_coefficient * constant))
    # The smaller positive root in its stable form; a set that holds 0 (C <= 0) has no positive lower end.
    is_away_from_0 = constant > 0 and half + root > 0
    low = constant / (half + root) if is_away_from_0 else 0.0
    if a_coefficient <= 0 or denominator <= 0:
        return low, math.inf
    return low, max(low, (half + root) / a_coefficient)


def student_t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t expanded around the normal one; within 0.2 % from 4 degrees on at 97.5 %.

    >>> round(student_t_quantile(0.975, 9), 3), round(student_t_quantile(0.975, 199), 3)
    (2.262, 1.972)

    Reference: Abramowitz and Stegun, 1964, equation 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
