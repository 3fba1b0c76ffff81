"""Student's t at whole degrees of freedom, exactly: few batch sizes leave one or two degrees."""

from __future__ import annotations

import math


def student_t_cdf(t: float, degrees: int) -> float:
    """Probability that Student's t with `degrees` is at most t.

    With theta = atan(t / sqrt(degrees)), A = P(|T| <= |t|):

        degrees odd:   A = (2 / pi) (theta + sin cos (1 + (2/3) cos^2 + (2 4)/(3 5) cos^4 + ...))
        degrees even:  A = sin (1 + (1/2) cos^2 + (1 3)/(2 4) cos^4 + ...)

    Args:
        t: any number.
        degrees: at least 1.

    Raises:
        ValueError: degrees < 1.

    >>> round(student_t_cdf(12.706, 1), 4), round(student_t_cdf(2.228, 10), 4)
    (0.975, 0.975)

    Reference: Abramowitz and Stegun, 1964, equations 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees!r}")
    theta = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(3 if is_odd else 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    share = 2.0 / math.pi * (theta + sine * total) if is_odd else sine * total
    return 0.5 + math.copysign(share / 2, t)


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t that Student's t with `degrees` stays below with `probability`; by bisection.

    Raises:
        ValueError: not 0 < probability < 1, or degrees < 1.

    >>> round(student_t_quantile(0.975, 1), 2), round(student_t_quantile(0.95, 4), 3)
    (12.71, 2.132)
    """
    if not 0 < probability < 1:
        raise ValueError(f"a probability must be in (0, 1), got {probability!r}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability and high < 1e15:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return high
