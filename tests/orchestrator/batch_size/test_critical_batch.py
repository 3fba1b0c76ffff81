"""The fitted hyperbola against curves whose truth is known, and the published runs on MNIST."""

import math

import numpy as np
import pytest

from orchestrator.batch_size.critical_batch import (
    RunSteps,
    fit_critical_batch,
    median_steps,
    regions,
)
from orchestrator.batch_size.rate_rule import rate_factor_of, rate_rule
from orchestrator.batch_size.student_t import student_t_cdf, student_t_quantile

S_MIN, B_CRIT = 50.0, 100.0
# Steps to loss 0.2 on MNIST at the best rate of each batch size, as once measured: B_crit 98.9.
MNIST = dict(zip([2**k for k in range(2, 12)], [1550, 780, 330, 212, 128, 87, 68, 64, 63, 58], strict=True))


def drawn(rng, *, num_batches, scatter, seeds=1, limit=math.inf, shared=0.0):
    """Runs of batch sizes 4, 8, ... scattered around the curve; those above the limit end there."""
    runs = []
    for batch in 2.0 ** np.arange(2, 2 + num_batches):
        middle = S_MIN * (1 + B_CRIT / batch) * math.exp(shared * rng.standard_normal())
        for noise in rng.standard_normal(seeds):
            steps = max(1, round(middle * math.exp(scatter * noise)))
            runs.append(RunSteps(int(batch), min(steps, int(min(limit, 1e9))), reached=steps <= limit))
    return runs


def coverage(num_draws, **settings):
    """How often each interval holds its truth: B_crit, S_min, E_min."""
    rng = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(num_draws):
        fit = fit_critical_batch(drawn(rng, **settings))
        intervals = fit.b_crit_interval, fit.s_min_interval, fit.e_min_interval
        truths = B_CRIT, S_MIN, S_MIN * B_CRIT
        hits += [low <= truth <= high for (low, high), truth in zip(intervals, truths, strict=True)]
    return hits / num_draws


def test_exact_runs_give_the_curve_back():
    # S = 50 (1 + 96 / B): whole numbers of steps at each of these batches
    runs = [RunSteps(batch, 50 + 4800 // batch) for batch in (8, 16, 32, 96, 480, 4800)]
    fit = fit_critical_batch(runs)
    assert (fit.b_crit, fit.s_min, fit.e_min) == pytest.approx((96, 50, 4800), rel=1e-3)
    assert fit.scatter < 1e-6
    assert fit.b_crit_interval == pytest.approx((96, 96), rel=1e-3)
    assert fit.reliable
    # at B_crit twice the least steps and twice the least examples
    assert fit.steps(fit.b_crit) == pytest.approx(2 * fit.s_min)
    assert fit.examples(fit.b_crit) == pytest.approx(2 * fit.e_min)
    # (S / S_min - 1) (E / E_min - 1) = 1 on all of it
    assert (fit.steps(7) / fit.s_min - 1) * (fit.examples(7) / fit.e_min - 1) == pytest.approx(1)


def test_a_target_within_a_few_steps_says_nothing_reliable():
    # The smallest rounding there is, to whole steps, decides all of these: S_min could be anything around 1.
    steps = {1: 3, 2: 2, 4: 1, 8: 1, 16: 1, 32: 1, 64: 1, 128: 1, 256: 1}
    fit = fit_critical_batch([RunSteps(batch, count) for batch, count in steps.items()])
    assert fit.b_crit_interval[1] < 4 * fit.b_crit_interval[0]
    assert not fit.reliable
    assert "too few to compare in whole ones: lower the target loss" in fit.reason


def test_the_published_runs_give_the_published_critical_batch():
    fit = fit_critical_batch([RunSteps(batch, steps) for batch, steps in MNIST.items()])
    assert fit.b_crit == pytest.approx(98.9, rel=0.02)
    assert fit.s_min == pytest.approx(53, rel=0.02)
    assert fit.e_min == pytest.approx(5234, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_batches": 10, "scatter": 0.1},
        {"num_batches": 5, "scatter": 0.1},
        {"num_batches": 8, "scatter": 0.1, "seeds": 3, "shared": 0.1},  # seeds of a batch err together
    ],
)
def test_nominal_95_percent_intervals_hold_the_truth_that_often(settings):
    hits = coverage(1000, **settings)  # standard error 0.7 %
    assert (hits >= 0.93).all()
    assert (hits <= 0.975).all()


def test_intervals_hold_the_truth_where_small_batches_never_reach_the_target():
    # The two smallest of eight batches need 1300 and 675 steps, and are ended at 500.
    hits = coverage(60, num_batches=8, scatter=0.15, limit=500)  # standard error 2.8 %
    assert (hits >= 0.86).all()


def test_a_censored_run_says_more_than_none():
    runs = [RunSteps(batch, steps) for batch, steps in MNIST.items() if batch > 4]
    without = fit_critical_batch(runs)
    # Batch 4 took more than 1200 steps: too small a least number of examples is ruled out.
    fit = fit_critical_batch([*runs, RunSteps(4, 1200, reached=False)])
    assert fit.num_censored == 1
    assert fit.e_min > 0.99 * without.e_min
    assert fit.b_crit == pytest.approx(98.9, rel=0.1)


def test_batches_of_perfect_scaling_alone_give_a_lower_bound_and_no_number():
    rng = np.random.default_rng(1)
    runs = [
        RunSteps(batch, round(51200 / batch * math.exp(0.02 * rng.standard_normal())))
        for batch in (1, 2, 4, 8, 16, 32)
    ]
    fit = fit_critical_batch(runs)
    assert math.isinf(fit.b_crit_interval[1])
    assert fit.b_crit_interval[0] > 32
    assert not fit.reliable
    assert "try batches larger than 32" in fit.reason
    assert fit.e_min == pytest.approx(51200, rel=0.05)


def test_one_bad_seed_of_three_moves_nothing():
    runs = [RunSteps(batch, steps) for batch, steps in MNIST.items() for _ in range(2)]
    bad = [RunSteps(batch, 20 * steps) for batch, steps in MNIST.items()]
    lost = [RunSteps(batch, 3 * steps, reached=False) for batch, steps in MNIST.items()]
    plain = fit_critical_batch(runs)
    assert fit_critical_batch(runs + bad).b_crit == pytest.approx(plain.b_crit)
    assert fit_critical_batch(runs + lost).b_crit == pytest.approx(plain.b_crit)


def test_two_batch_sizes_are_refused_with_a_sentence():
    runs = [RunSteps(4, 100), RunSteps(8, 60), RunSteps(16, 500, reached=False)]
    with pytest.raises(ValueError, match="2 of 3 batch sizes reached the target; the fit needs 3"):
        fit_critical_batch(runs)


def test_medians_are_bounded_by_runs_that_did_not_reach_the_target():
    runs = [RunSteps(8, 100), RunSteps(8, 300, reached=False)]
    (median,) = median_steps(runs)
    assert not median.reached
    assert median.steps == pytest.approx(math.sqrt(100 * 300))


def test_regions_follow_from_the_tolerance():
    cut = regions(100.0, tolerance=0.2)
    runs = [RunSteps(batch, 50 + 5000 // batch) for batch in (10, 20, 50, 100, 500, 5000)]
    fit = fit_critical_batch(runs)
    # at most 20 % more than the least examples, at most 20 % more than the least steps
    assert fit.examples(cut.perfect_until) == pytest.approx(1.2 * fit.e_min, rel=1e-2)
    assert fit.steps(cut.maximal_from) == pytest.approx(1.2 * fit.s_min, rel=1e-2)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (8, 2.3060), (30, 2.0423)]
)
def test_quantiles_of_student_t_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-4)
    assert student_t_cdf(-quantile, degrees) == pytest.approx(0.025, abs=1e-5)


def test_rates_follow_the_rule_of_the_optimizer():
    assert [rate_rule(name) for name in ("sgd", "lars", "adamw", "ranger_lars", "lamb", "adam")] == [
        "linear", "linear", "square root", "square root", "square root", "square root",
    ]  # fmt: skip
    assert rate_factor_of(16, rate_rule("adamw")) == 4
    with pytest.raises(ValueError, match="above 0"):
        rate_factor_of(0, "linear")
