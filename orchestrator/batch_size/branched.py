"""Branched training: from one checkpoint, the largest multiple of the batch that loses nothing in a window."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.batch_size.results_file import BranchRun
from orchestrator.batch_size.student_t import student_t_quantile

TOLERANCE = 0.1
CONFIDENCE = 0.95
Verdict = Literal["loses nothing", "loses", "undecided"]


@dataclass(frozen=True)
class Branch:
    """What was found of one factor.

    Attributes:
        factor: k.
        verdict: of the test.
        lost_share: mean loss of progress, as a share of the fall of the loss without the factor.
        bound_share: its one-sided upper confidence bound, inf where a branch diverged.
        num_seeds: pairs of branches.
    """

    factor: int
    verdict: Verdict
    lost_share: float
    bound_share: float
    num_seeds: int


@dataclass(frozen=True)
class Branches:
    """The answer.

    Attributes:
        factor: the largest k that loses nothing, with all smaller ones; 1 where already the smallest loses.
        lost_at: the smallest k that was not shown to lose nothing; None where none was tried.
        branches: ascending.
        fall: mean fall of the loss over the window at the batch itself.
    """

    factor: int
    lost_at: int | None
    branches: tuple[Branch, ...]
    fall: float


def judge(
    runs: Sequence[BranchRun], *, tolerance: float = TOLERANCE, confidence: float = CONFIDENCE
) -> Branches:
    """The largest k that loses nothing: a non-inferiority test of each k, in ascending order.

    All branches of a seed start from the same weights and see the same examples in the same order, in k times fewer
    steps. With L the loss at the end and L_0 that at the beginning, for each seed

        d = L(k) - L(1) - tolerance (L_0 - L(1))

    k loses nothing where the one-sided upper confidence bound of the mean of d (Student's t over the seeds) is at
    most 0: it makes at least 1 - tolerance of the progress. It loses where the lower bound is above 0, or a branch
    diverged. Ascending and ended at the first k that is not shown to lose nothing, the tests together err with the
    probability of one (a fixed sequence).

    Raises:
        ValueError: fewer than two seeds have a branch of k = 1, one of these diverged, or the loss did not fall.

    Reference: Merrill et al., 2025, arXiv 2505.23971 (branched training); Maurer, Hothorn and Lehmacher, 1995
        (fixed sequences of tests).
    """
    base = {run.seed: run for run in runs if run.factor == 1}
    if len(base) < 2:
        raise ValueError(f"the test needs branches of at least two seeds without a factor, got {len(base)}")
    if any(run.loss_after is None for run in base.values()):
        raise ValueError(
            "training diverged from the checkpoint on at its own batch and rate. Take an earlier "
            "checkpoint, or train with a lower rate."
        )
    falls = [run.loss_before - _after(run) for run in base.values()]
    fall, fall_low, _ = _bounds(falls, confidence)
    if fall_low <= 0:
        raise ValueError(
            f"the loss fell by {fall:.3g} within the window, which cannot be told from 0: nothing can be lost "
            "of it. Give a longer --window, or an earlier checkpoint."
        )
    branches = []
    for factor in sorted({run.factor for run in runs} - {1}):
        pairs = [(run, base[run.seed]) for run in runs if run.factor == factor and run.seed in base]
        branches.append(_judged(factor, pairs, fall, tolerance, confidence))
    best, lost_at = 1, None
    for branch in branches:
        if branch.verdict != "loses nothing":
            lost_at = branch.factor
            break
        best = branch.factor
    return Branches(best, lost_at, tuple(branches), fall)


def _judged(
    factor: int,
    pairs: Sequence[tuple[BranchRun, BranchRun]],
    fall: float,
    tolerance: float,
    confidence: float,
) -> Branch:
    if any(run.loss_after is None for run, _ in pairs):
        return Branch(factor, "loses", math.inf, math.inf, len(pairs))
    if len(pairs) < 2:
        return Branch(factor, "undecided", math.nan, math.inf, len(pairs))
    excess = [_after(run) - _after(own) - tolerance * (own.loss_before - _after(own)) for run, own in pairs]
    mean, low, high = _bounds(excess, confidence)
    verdict: Verdict = "loses nothing" if high <= 0 else "loses" if low > 0 else "undecided"
    return Branch(factor, verdict, mean / fall + tolerance, high / fall + tolerance, len(pairs))


def _after(run: BranchRun) -> float:
    assert run.loss_after is not None
    return run.loss_after


def _bounds(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean, one-sided lower and one-sided upper bound."""
    mean = statistics.fmean(values)
    error = (
        student_t_quantile(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return mean, mean - error, mean + error


def next_branch(
    factors: Sequence[int],
    seeds: Sequence[int],
    runs: Sequence[BranchRun],
    running: Collection[tuple[int, int]],
) -> tuple[int, int] | None:
    """The next (factor, seed) to run; factors above one that loses are not tried. None where there is none now."""
    done = {(run.factor, run.seed) for run in runs}
    for factor in (1, *sorted(set(factors) - {1})):
        for seed in seeds:
            if (factor, seed) not in done and (factor, seed) not in running:
                return factor, seed
        if any((factor, seed) in running for seed in seeds):
            # Whether a larger one is worth a try depends on this one.
            return None
        if factor > 1 and judge([run for run in runs if run.factor <= factor]).lost_at is not None:
            return None
    return None


def implied_critical_batch(batch: int, factor: float, *, tolerance: float = TOLERANCE) -> float:
    """B_crit at which `factor` times the batch makes just 1 - tolerance of the progress per example.

    Examples to a loss grow as 1 + B / B_crit along the hyperbola, so with u = 1 / (1 - tolerance)

        (1 + k B / B_crit) / (1 + B / B_crit) = u        B_crit = B (k - u) / (u - 1)

    0 where k <= u.

    >>> round(implied_critical_batch(64, 2), 1)
    512.0
    """
    allowed = 1 / (1 - tolerance)
    return max(0.0, batch * (factor - allowed) / (allowed - 1))
