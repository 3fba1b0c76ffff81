"""Likelihood of steps counted at several batch sizes, some of them known only to be more than a limit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# From the scale without censored observations, which few of them move by much.
_NEWTON_STEPS = 6
_LONGEST_STEP = 1.0
_EDGE_HALVINGS = 18


@dataclass(frozen=True)
class StepsLikelihood:
    """Normal scatter s of log S around the hyperbola, its largest likelihood over s at given a and c.

        log S_i = a + g_i(c) + s e_i,   g_i(c) = log(1 + exp(c) / B_i),   e_i ~ N(0, 1)
        l(a, c) = max over s of  sum over reached of [-log s - r_i^2 / (2 s^2)]  +  sum over censored of
                  log Phi(-r_i / s),    r_i = y_i - g_i(c) - a

    where a = log S_min, c = log B_crit, y_i is log S_i where the target was reached, and the log of the limit at
    which a run was ended where it was not. Without censored runs this is least squares in log space.

    Attributes:
        batches: B_i.
        log_steps: y_i.
        is_censored: the target was not reached within exp(y_i) steps.

    Reference: Tobin, 1958, Econometrica 26(1) (censored regression).
    """

    batches: np.ndarray
    log_steps: np.ndarray
    is_censored: np.ndarray

    @property
    def num_reached(self) -> int:
        """Observations that are not censored."""
        return int((~self.is_censored).sum())

    def _detrended(self, log_critical: np.ndarray) -> np.ndarray:
        """y_i - g_i(c): a row for each c."""
        return self.log_steps - np.log1p(np.exp(log_critical[:, None] - np.log(self.batches)))

    def at(self, log_least: np.ndarray, log_critical: np.ndarray) -> np.ndarray:
        """l(a, c), elementwise, without its constant."""
        return self._of_residuals(self._detrended(log_critical) - log_least[:, None])

    def _of_residuals(self, residuals: np.ndarray) -> np.ndarray:
        reached, censored = residuals[:, ~self.is_censored], residuals[:, self.is_censored]
        squares = np.maximum(np.square(reached).sum(1), 1e-24)
        count = self.num_reached
        inverse = np.sqrt(count / squares)  # 1 / s where nothing is censored
        if censored.shape[1]:
            for _ in range(_NEWTON_STEPS):
                inverse = inverse * np.exp(_newton_step(inverse, squares, censored, count))
        value = count * np.log(inverse) - np.square(inverse) * squares / 2
        return value + _log_above(inverse[:, None] * censored).sum(1)

    def best_least(self, log_critical: np.ndarray) -> np.ndarray:
        """The a of the largest likelihood at each c.

        Golden section: in (a / s, 1 / s) the likelihood is concave, so that it has one maximum along a.
        """
        detrended = self._detrended(log_critical)
        start = detrended[:, ~self.is_censored].mean(1)
        if not self.is_censored.any():
            return start
        # Censored runs can only raise it: to their own limits at most, and then some.
        low, high = start.copy(), np.maximum(start, detrended.max(1)) + 1.0
        ratio = (np.sqrt(5.0) - 1) / 2
        for _ in range(24):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            rises = self._of_residuals(detrended - right[:, None]) > self._of_residuals(
                detrended - left[:, None]
            )
            low, high = np.where(rises, left, low), np.where(rises, high, right)
        return (low + high) / 2

    def edges_of_least(
        self, log_critical: np.ndarray, best: np.ndarray, threshold: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest a with l(a, c) >= threshold, at each c whose best a has it."""
        if not self.is_censored.any():
            # l = count log(count / RSS) / 2 - count / 2 and RSS(a) = RSS(best) + count (a - best)^2
            count = self.num_reached
            least = np.square(self._detrended(log_critical) - best[:, None]).sum(1)
            allowed = count * np.exp(-2 * threshold / count - 1)
            width = np.sqrt(np.maximum(allowed - least, 0.0) / count)
            return best - width, best + width
        edges = []
        for sign in (-1.0, 1.0):
            inside, outside = best.copy(), best + sign * 1.0
            for _ in range(8):
                outside = np.where(
                    self.at(outside, log_critical) >= threshold, best + 2 * (outside - best), outside
                )
            for _ in range(_EDGE_HALVINGS):
                middle = (inside + outside) / 2
                holds = self.at(middle, log_critical) >= threshold
                inside, outside = np.where(holds, middle, inside), np.where(holds, outside, middle)
            edges.append(inside)
        return edges[0], edges[1]


def _newton_step(inverse: np.ndarray, squares: np.ndarray, censored: np.ndarray, count: int) -> np.ndarray:
    """Newton's step of u = log(1 / s) towards the largest likelihood.

    With x = r / s of the censored and m(x) the hazard of the normal distribution, m' = m (m - x):

        l' = n - sum r^2 / s^2 - sum x m      l'' = -2 sum r^2 / s^2 - sum (x m + x^2 m (m - x))
    """
    x = inverse[:, None] * censored
    hazard = np.exp(-np.square(x) / 2 - np.log(2 * np.pi) / 2 - _log_above(x))
    scaled = np.square(inverse) * squares
    slope = count - scaled - (x * hazard).sum(1)
    curvature = -2 * scaled - (x * hazard + np.square(x) * hazard * (hazard - x)).sum(1)
    return np.clip(slope / np.maximum(-curvature, 1e-3), -_LONGEST_STEP, _LONGEST_STEP)


def _log_above(x: np.ndarray) -> np.ndarray:
    """log of the probability that a standard normal is above x, accurate far out."""
    return torch.special.log_ndtr(torch.from_numpy(-x)).numpy()
