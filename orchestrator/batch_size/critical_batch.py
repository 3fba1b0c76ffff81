"""Critical batch size B_crit = E_min / S_min: the steps-examples hyperbola fitted to runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from orchestrator.batch_size.steps_likelihood import StepsLikelihood
from orchestrator.batch_size.student_t import student_t_quantile

Interval = tuple[float, float]
TOLERANCE = 0.2
# Fewer batch sizes that reach the target leave no degree of freedom for the scatter.
MIN_BATCHES = 3
# The curve is looked at from e^-9 times the smallest batch to e^9 times the largest: beyond, it does not change.
_REACH = 9.0
_GRID = 160
_WALKS = 6
_MAX_INTERVAL_RATIO = 4.0
# Steps are counted in whole ones: below this, that alone moves S_min, and B_crit with it, by more than a fifth.
_MIN_LEAST_STEPS = 5.0


@dataclass(frozen=True)
class RunSteps:
    """How many steps one run took to the target.

    Attributes:
        batch: B, examples of a step.
        steps: S to the target, or the limit at which the run was ended.
        reached: False where the target was not reached by then.
    """

    batch: int
    steps: int
    reached: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1 or self.steps < 1:
            raise ValueError(f"a run needs a batch and steps of at least 1, got {self.batch}, {self.steps}")


@dataclass(frozen=True)
class BatchSteps:
    """The median over the seeds of one batch size.

    Attributes:
        batch: B.
        steps: the median, or a lower bound of it.
        reached: whether it is known, not only bounded.
    """

    batch: int
    steps: float
    reached: bool


def median_steps(runs: Iterable[RunSteps]) -> list[BatchSteps]:
    """The median of each batch size over its runs, ascending; censored where censored runs decide it.

    With every run that did not reach the target put at its limit, the median can only be too small; put at
    infinity, only too large. Where both agree it is known.

    >>> median_steps([RunSteps(8, 100), RunSteps(8, 120), RunSteps(8, 300, reached=False)])
    [BatchSteps(batch=8, steps=120.0, reached=True)]
    >>> median_steps([RunSteps(8, 100), RunSteps(8, 300, reached=False), RunSteps(8, 300, reached=False)])
    [BatchSteps(batch=8, steps=300.0, reached=False)]
    """
    by_batch: dict[int, list[RunSteps]] = {}
    for run in runs:
        by_batch.setdefault(run.batch, []).append(run)
    found = []
    for batch, own in sorted(by_batch.items()):
        least = statistics.median(math.log(run.steps) for run in own)
        most = statistics.median(math.log(run.steps) if run.reached else math.inf for run in own)
        found.append(BatchSteps(batch, round(math.exp(least), 9), least == most))
    return found


@dataclass(frozen=True)
class CriticalBatch:
    """The fitted hyperbola; each interval has the nominal coverage.

    Attributes:
        b_crit: E_min / S_min, in examples; inf or 0 where the batches lie on one side of it only.
        s_min: least steps, at an infinite batch.
        e_min: least examples, at an infinitesimal one.
        b_crit_interval: its upper end is inf where nothing bounds it.
        s_min_interval: likewise.
        e_min_interval: likewise.
        scatter: standard deviation of log S around the curve.
        confidence: nominal coverage.
        num_reached: batch sizes that reached the target.
        num_censored: batch sizes known only not to have reached it.
        reliable: the interval of b_crit is bounded and spans less than a factor of 4, and s_min is at least 5.
        reason: why, or why not and what would help.
    """

    b_crit: float
    s_min: float
    e_min: float
    b_crit_interval: Interval
    s_min_interval: Interval
    e_min_interval: Interval
    scatter: float
    confidence: float
    num_reached: int
    num_censored: int
    reliable: bool
    reason: str

    def steps(self, batch: float) -> float:
        """S = S_min + E_min / B, which is S_min (1 + B_crit / B)."""
        return self.s_min + self.e_min / batch

    def examples(self, batch: float) -> float:
        """E = E_min + S_min B."""
        return self.e_min + self.s_min * batch


@dataclass(frozen=True)
class Regions:
    """The three regions of batch sizes, made precise on the hyperbola by one tolerance t.

        perfect scaling           E <= (1 + t) E_min, so B <= t B_crit: twice the batch, nearly half the steps
        diminishing returns       in between; at B_crit twice the least steps and twice the least examples
        maximal data parallelism  S <= (1 + t) S_min, so B >= B_crit / t: a larger batch saves no steps

    Attributes:
        perfect_until: t B_crit.
        maximal_from: B_crit / t.
        tolerance: t.

    Reference: Shallue et al., 2019, JMLR 20(112), section 4.1 (the regions); McCandlish et al., 2018, arXiv
        1812.06162, equation 2.11 (the curve).
    """

    perfect_until: float
    maximal_from: float
    tolerance: float

    def of(self, batch: float) -> str:
        """Name of the region that a batch lies in."""
        if batch <= self.perfect_until:
            return "perfect scaling"
        return "diminishing returns" if batch < self.maximal_from else "maximal data parallelism"


def regions(b_crit: float, *, tolerance: float = TOLERANCE) -> Regions:
    """The regions around a critical batch.

    Raises:
        ValueError: not 0 < tolerance < 1.

    >>> regions(100.0).of(20), regions(100.0).of(100), regions(100.0).of(500)
    ('perfect scaling', 'diminishing returns', 'maximal data parallelism')
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"the tolerance of the regions must be in (0, 1), got {tolerance!r}")
    return Regions(tolerance * b_crit, b_crit / tolerance, tolerance)


def fit_critical_batch(runs: Iterable[RunSteps], *, confidence: float = 0.95) -> CriticalBatch:
    """Fit the steps-examples hyperbola to the runs of several batch sizes.

        (S / S_min - 1) (E / E_min - 1) = 1,   E = B S,   so   S = S_min (1 + B_crit / B)

    One observation a batch size: the median over its seeds (see `median_steps`), so that one bad seed does no
    harm and what all seeds of a batch share counts once. Maximum likelihood with normal scatter of log S; a batch
    that did not reach the target counts by the probability of that. Interval of a parameter: all values for which
    some curve with it has, with n batches that reached the target and Student's t at n - 2 degrees of freedom,

        2 (l_max - l) <= n log(1 + t^2 / (n - 2))

    the likelihood-ratio interval, which for least squares without censoring is the F test's. Its ends come from
    one walk over c = log B_crit, since the set of (S_min, B_crit) that is not rejected projects on all three.

    Args:
        runs: at the best rate of their batch size each; a badly tuned rate makes the curve meaningless.
        confidence: nominal coverage, in (0, 1).

    Raises:
        ValueError: fewer than three batch sizes reached the target, or confidence out of its range.

    Reference: McCandlish et al., 2018, arXiv 1812.06162, equation 2.11 and appendix D.3.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    medians = median_steps(runs)
    num_reached = sum(median.reached for median in medians)
    if num_reached < MIN_BATCHES:
        raise ValueError(
            f"{num_reached} of {len(medians)} batch sizes reached the target; the fit needs {MIN_BATCHES}. "
            "Raise the target loss or the steps, or give more batch sizes."
        )
    likelihood = StepsLikelihood(
        batches=np.array([float(median.batch) for median in medians]),
        log_steps=np.log([median.steps for median in medians]),
        is_censored=np.array([not median.reached for median in medians]),
    )
    return _fitted(likelihood, confidence)


def _fitted(likelihood: StepsLikelihood, confidence: float) -> CriticalBatch:
    count = likelihood.num_reached
    quantile = student_t_quantile(0.5 + confidence / 2, count - 2)
    drop = count * math.log1p(quantile**2 / (count - 2)) / 2
    ends = math.log(likelihood.batches.min()) - _REACH, math.log(likelihood.batches.max()) + _REACH
    log_critical, log_least, threshold, c, a = _zoomed(likelihood, ends, drop)
    lows, highs = likelihood.edges_of_least(c, a, threshold)
    # Where the walk's own end is not rejected, nothing bounds the parameter on that side.
    opens_below, opens_above = bool(c.min() <= ends[0] + 1e-9), bool(c.max() >= ends[1] - 1e-9)
    b_crit_interval = (
        0.0 if opens_below else math.exp(c.min()),
        math.inf if opens_above else math.exp(c.max()),
    )
    residuals = likelihood.log_steps - log_least - np.log1p(np.exp(log_critical) / likelihood.batches)
    squares = float(np.square(residuals[~likelihood.is_censored]).sum())
    at_end = log_critical[0] <= ends[0] + 1e-9, log_critical[0] >= ends[1] - 1e-9
    s_min = 0.0 if at_end[1] else math.exp(log_least[0])
    reliable, reason = _verdict(b_crit_interval, s_min, likelihood, confidence)
    return CriticalBatch(
        b_crit=0.0 if at_end[0] else math.inf if at_end[1] else math.exp(log_critical[0]),
        s_min=s_min,
        e_min=0.0 if at_end[0] else math.exp(log_critical[0] + log_least[0]),
        b_crit_interval=b_crit_interval,
        s_min_interval=(0.0 if opens_above else math.exp(lows.min()), math.exp(highs.max())),
        e_min_interval=(0.0 if opens_below else math.exp((c + lows).min()), math.exp((c + highs).max())),
        scatter=math.sqrt(squares / (count - 2)),
        confidence=confidence,
        num_reached=count,
        num_censored=int(likelihood.is_censored.sum()),
        reliable=reliable,
        reason=reason,
    )


def _zoomed(
    likelihood: StepsLikelihood, ends: tuple[float, float], drop: float
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray, np.ndarray]:
    """The likeliest (log B_crit, log S_min), the least likelihood that is kept, and what of a walk is kept.

    A wide walk, then narrower ones over what was left, until that is much wider than a cell of the grid.
    """
    (low, high), walks = ends, 0
    while True:
        grid, best, values = _walk(likelihood, low, high)
        log_critical, log_least = _peak(likelihood, grid, best, int(values.argmax()))
        threshold = max(values.max(), likelihood.at(log_least, log_critical)[0]) - drop
        kept = np.flatnonzero(values >= threshold)
        walks += 1
        if len(kept) >= _GRID // 4 or walks == _WALKS:
            # The likeliest is among them, also where the runs have no scatter and the grid has nothing to keep.
            c, a = np.append(grid[kept], log_critical), np.append(best[kept], log_least)
            return log_critical, log_least, threshold, c, a
        step = grid[1] - grid[0]
        first, last = (grid[kept[0]], grid[kept[-1]]) if len(kept) else (log_critical[0], log_critical[0])
        low, high = max(ends[0], first - step), min(ends[1], last + step)


def _walk(likelihood: StepsLikelihood, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid of log B_crit, the best log S_min at each, and the likelihood there."""
    grid = np.linspace(low, high, _GRID)
    best = likelihood.best_least(grid)
    return grid, best, likelihood.at(best, grid)


def _peak(
    likelihood: StepsLikelihood, grid: np.ndarray, best: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """(log B_crit, log S_min) of the largest likelihood, between the neighbours of the grid's best point."""
    fine = np.linspace(grid[max(0, top - 1)], grid[min(len(grid) - 1, top + 1)], _GRID + 1)
    at = int(likelihood.at(np.interp(fine, grid, best), fine).argmax())
    log_critical = fine[at : at + 1]
    return log_critical, likelihood.best_least(log_critical)


def _verdict(
    interval: Interval, s_min: float, likelihood: StepsLikelihood, confidence: float
) -> tuple[bool, str]:
    """Whether the interval of B_crit is narrow enough to choose from, and a sentence."""
    low, high = interval
    percent = f"{100 * confidence:g} %"
    if low == 0 and math.isinf(high):
        return False, f"the runs scatter too much to say anything at {percent}: add batch sizes and seeds"
    if math.isinf(high):
        largest = likelihood.batches.max()
        return False, f"B_crit is at least {low:.3g} at {percent}: try batches larger than {largest:g}"
    if low == 0:
        smallest = likelihood.batches.min()
        return False, f"B_crit is at most {high:.3g} at {percent}: try batches smaller than {smallest:g}"
    if s_min < _MIN_LEAST_STEPS:
        return (
            False,
            f"the least steps are {s_min:.2g}, too few to compare in whole ones: lower the target loss",
        )
    reason = f"the {percent} interval spans a factor of {high / low:.3g}"
    if high > _MAX_INTERVAL_RATIO * low:
        return False, f"{reason}, more than {_MAX_INTERVAL_RATIO:g}: add batch sizes around it, or seeds"
    return True, reason
