"""The test of branched training on losses that are drawn, and where the three methods disagree."""

import math

import numpy as np
import pytest

from orchestrator.batch_size.branched import implied_critical_batch, judge, next_branch
from orchestrator.batch_size.methods import branched_method, disagreements, noise_method, sweep_method
from orchestrator.batch_size.results_file import BranchRun

SEEDS = range(5)


def branch(factor, seed, after, before=2.0):
    return BranchRun(
        factor=factor, seed=seed, rate=0.1 * factor, outcome="diverged" if after is None else "limit",
        loss_before=before, loss_after=after,
    )  # fmt: skip


def branches(rng, shares, *, scatter=0.01):
    """Branches that lose a share of a fall of 1, on losses that scatter together by seed and a little apart."""
    runs = []
    for seed in SEEDS:
        together = 0.1 * rng.standard_normal()
        for factor, share in {1: 0.0, **shares}.items():
            runs.append(branch(factor, seed, 1 + share + together + scatter * rng.standard_normal()))
    return runs


def test_the_largest_factor_that_loses_nothing_is_found():
    found = judge(branches(np.random.default_rng(0), {2: 0.0, 4: 0.02, 8: 0.3, 16: 0.6}))
    assert (found.factor, found.lost_at) == (4, 8)
    assert [one.verdict for one in found.branches] == ["loses nothing", "loses nothing", "loses", "loses"]
    assert found.branches[2].lost_share == pytest.approx(0.3, abs=0.03)


def test_a_factor_that_loses_the_margin_passes_in_5_percent_of_trials():
    rng, trials = np.random.default_rng(1), 1000
    passed = sum(judge(branches(rng, {2: 0.1})).factor == 2 for _ in range(trials))
    assert 0.03 <= passed / trials <= 0.07  # standard error 0.7 %


def test_a_larger_factor_that_happens_to_pass_counts_for_nothing_behind_one_that_does_not():
    found = judge(branches(np.random.default_rng(2), {2: 0.4, 4: 0.0}))
    assert (found.factor, found.lost_at) == (1, 2)


def test_branches_that_scatter_much_are_undecided_and_not_passed():
    found = judge(branches(np.random.default_rng(3), {2: 0.05}, scatter=0.2))
    assert found.branches[0].verdict == "undecided"
    assert (found.factor, found.lost_at) == (1, 2)


def test_a_branch_that_diverged_has_lost():
    runs = branches(np.random.default_rng(4), {2: 0.0, 4: 0.0})
    runs = [branch(4, run.seed, None) if run.factor == 4 and run.seed == 3 else run for run in runs]
    found = judge(runs)
    assert (found.factor, found.lost_at) == (2, 4)
    assert math.isinf(found.branches[1].bound_share)


def test_where_the_loss_does_not_fall_nothing_can_be_lost():
    flat = [branch(factor, seed, 2 + 0.01 * (-1) ** seed) for factor in (1, 2) for seed in SEEDS]
    with pytest.raises(ValueError, match="cannot be told from 0"):
        judge(flat)
    with pytest.raises(ValueError, match="at its own batch and rate"):
        judge([branch(1, seed, None) for seed in SEEDS])
    with pytest.raises(ValueError, match="at least two seeds"):
        judge([branch(1, 0, 1.0)])


def test_factors_above_one_that_loses_are_not_run():
    made, runs = branches(np.random.default_rng(5), {2: 0.0, 4: 0.5, 8: 0.0, 16: 0.0}), []
    while (chosen := next_branch((2, 4, 8, 16), SEEDS, runs, ())) is not None:
        runs += [run for run in made if (run.factor, run.seed) == chosen]
    assert sorted({run.factor for run in runs}) == [1, 2, 4]
    assert len(runs) == 3 * len(SEEDS)
    # While the branches of 2 run, nobody knows whether 4 is worth a try.
    assert next_branch((2, 4), SEEDS, runs[:5], [(2, seed) for seed in SEEDS]) is None


def test_the_implied_critical_batch_makes_just_the_allowed_progress():
    batch, factor, tolerance = 64, 8, 0.1
    critical = implied_critical_batch(batch, factor, tolerance=tolerance)
    examples = [1 + size / critical for size in (batch, factor * batch)]
    assert examples[0] / examples[1] == pytest.approx(1 - tolerance)
    assert implied_critical_batch(64, 1) == 0


def test_methods_that_are_far_apart_are_told_and_one_is_believed():
    noise = noise_method(100, 140, where="at step 30")
    near, far = sweep_method(60, 90), sweep_method(3000, 5000)
    assert disagreements([noise, near], adaptive=False) == []
    (sentence,) = disagreements([noise, far], adaptive=True)
    assert "disagree by a factor of 21.4" in sentence  # 3000 / 140
    assert "Believe the sweep: for Adam-like optimizers" in sentence


def test_branches_from_a_rate_far_too_small_are_not_believed():
    tuned = branched_method(8000, math.inf, batch=8, factor=32, rate=0.1, best_rate=0.15)
    timid = branched_method(8000, math.inf, batch=8, factor=32, rate=0.01, best_rate=0.15)
    sweep = sweep_method(80, 120)
    assert disagreements([sweep, tuned], adaptive=False)[0].endswith("Believe branched training.")
    (sentence,) = disagreements([sweep, timid], adaptive=False)
    assert "from the rate 0.01 on" in sentence
    assert sentence.endswith("Believe the sweep.")
