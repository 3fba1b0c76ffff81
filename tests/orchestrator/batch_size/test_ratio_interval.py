"""The interval of a ratio against its own inequality, and Student's t against printed tables."""

from __future__ import annotations

import math

import pytest

from orchestrator.batch_size.ratio_interval import fieller_interval, student_t_quantile


def test_student_t_quantiles_match_the_tables():
    # Printed tables of Student's t, 97.5 %: 4, 9, 29, 99 degrees.
    for degrees, quantile in ((4, 2.7764), (9, 2.2622), (29, 2.0452), (99, 1.9842)):
        assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-3)


def test_fieller_interval_solves_its_own_inequality():
    # At both ends (a - theta b)^2 = q^2 (var_a - 2 theta cov + theta^2 var_b).
    a, b, var_a, var_b, covariance, q = 5.0, 2.0, 0.3, 0.1, -0.05, 2.0
    for theta in fieller_interval(
        a, b, var_numerator=var_a, var_denominator=var_b, covariance=covariance, quantile=q
    ):
        left, right = (a - theta * b) ** 2, q**2 * (var_a - 2 * theta * covariance + theta**2 * var_b)
        assert left == pytest.approx(right, rel=1e-9)


def test_fieller_interval_is_open_above_when_the_denominator_may_be_zero():
    for b in (0.1, 0.0, -0.1):
        low, high = fieller_interval(
            5.0, b, var_numerator=0.3, var_denominator=0.1, covariance=0.0, quantile=2.0
        )
        # (5 - theta b)^2 = 4 (0.3 + 0.1 theta^2) at the lower end, a positive number.
        assert (5 - low * b) ** 2 == pytest.approx(4 * (0.3 + 0.1 * low**2))
        assert low > 0
        assert math.isinf(high)
    both_open = fieller_interval(0.1, 0.1, var_numerator=1.0, var_denominator=1.0, covariance=0, quantile=2)
    assert both_open == (0.0, math.inf)
