"""The noise scale against cases whose truth is known in closed form."""

import json
import math
import re

import numpy as np
import pytest
import torch

from orchestrator.batch_size.noise_scale import (
    NoiseScale,
    NoiseScaleEstimator,
    recommended_batch,
    unbiased_moments,
)

SMALL, NUM_SMALL, DIM = 8, 8, 20  # examples of a small batch, small batches of a big one, parameters
BIG = SMALL * NUM_SMALL


def gaussian_norms(*, tr_sigma, num_runs, num_steps, seed, num_small=NUM_SMALL):
    """Norms of gradients G + noise with |G| = 1: (small, big), each of shape (num_runs, num_steps)."""
    generator = np.random.default_rng(seed)
    scales = 1 / np.sqrt(1 + np.arange(DIM))  # the noise differs between the parameters
    scales *= math.sqrt(tr_sigma / np.sum(scales**2))
    noise = generator.standard_normal((num_runs, num_steps, num_small, DIM)) * scales / math.sqrt(SMALL)
    gradients = noise + np.eye(DIM)[0]
    return np.sum(gradients**2, -1).mean(-1), np.sum(gradients.mean(2) ** 2, -1)


def estimator_of(small, big, **settings):
    estimator = NoiseScaleEstimator(**settings)
    for small_sqnorm, big_sqnorm in zip(small, big):
        estimator.observe(small_sqnorm=small_sqnorm, small_batch=SMALL, big_sqnorm=big_sqnorm, big_batch=BIG)
    return estimator


@pytest.mark.parametrize("tr_sigma", [4.0, 64.0, 1024.0])
def test_moments_of_a_step_are_unbiased(tr_sigma):
    small, big = gaussian_norms(tr_sigma=tr_sigma, num_runs=1, num_steps=20_000, seed=0)
    moments = [unbiased_moments(s, SMALL, b, BIG) for s, b in zip(small[0].tolist(), big[0].tolist())]
    for values, truth in zip(np.array(moments).T, (1.0, tr_sigma)):
        z = (values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values)))
        assert abs(z) < 3.5  # two-sided chance 0.05 % per case


@pytest.mark.parametrize("tr_sigma", [4.0, 64.0, 1024.0])  # B_simple of 1/16, 1 and 16 big batches
def test_nominal_95_percent_intervals_hold_the_truth_that_often(tr_sigma):
    num_runs = 1000  # standard error of the coverage: 0.7 %
    small, big = gaussian_norms(tr_sigma=tr_sigma, num_runs=num_runs, num_steps=40, seed=1)
    hits = 0
    for run in range(num_runs):
        low, high = estimator_of(small[run].tolist(), big[run].tolist()).estimate().interval
        hits += low <= tr_sigma <= high
    assert 0.90 <= hits / num_runs <= 0.97


def test_intervals_are_bounded_where_the_signal_allows_it_and_open_where_not():
    for tr_sigma, num_runs, is_reliable in ((64.0, 100, True), (4096.0, 100, False)):
        small, big = gaussian_norms(tr_sigma=tr_sigma, num_runs=num_runs, num_steps=40, seed=2)
        estimates = [estimator_of(small[r].tolist(), big[r].tolist()).estimate() for r in range(num_runs)]
        share = sum(estimate.reliable for estimate in estimates) / num_runs
        assert share > 0.95 if is_reliable else share < 0.05
        for estimate in estimates:
            assert math.isnan(estimate.value) == math.isinf(estimate.interval[1])


def test_linear_regression_has_the_noise_scale_of_its_closed_form():
    # y = 0, loss (w x)^2 / 2 over d weights, x ~ N(0, I): the gradient of an example is x (x w), so
    # G = w, tr(Sigma) = E|x|^2 (x w)^2 - |w|^2 = (d + 2)|w|^2 - |w|^2, B_simple = d + 1.
    generator = torch.Generator().manual_seed(0)
    w = torch.full((10,), 0.5, dtype=torch.float64)
    estimator = NoiseScaleEstimator(decay=1.0)
    for _ in range(400):
        x = torch.randn(4, 4, 10, generator=generator, dtype=torch.float64)
        gradients = (x * (x @ w)[..., None]).mean(1)
        estimator.observe(
            small_sqnorm=gradients.square().sum(1).mean().item(),
            small_batch=4,
            big_sqnorm=gradients.mean(0).square().sum().item(),
            big_batch=16,
        )
    estimate = estimator.estimate()
    assert estimate.reliable
    assert estimate.interval[0] < 11 < estimate.interval[1]
    assert estimate.value == pytest.approx(11, rel=0.15)  # about twice its standard error


def test_moments_are_averaged_separately_with_bias_correction():
    # decay 1/2: weights 1/4, 1/2, 1 over 7/4. B = 2, b = 1: G2 = 2 big - small, trS = 2 (small - big).
    # small 3, 5, 4 and big 2, 3, 3: G2 = 1, 1, 2, trS = 2, 4, 2; means 11/7 and (0.5 + 2 + 2) / 1.75 = 18/7.
    estimator = NoiseScaleEstimator()
    estimator.decay = 0.5  # too short a memory for an estimate; the averages are what is tested
    for small, big in ((3.0, 2.0), (5.0, 3.0), (4.0, 3.0)):
        estimator.observe(small_sqnorm=small, small_batch=1, big_sqnorm=big, big_batch=2)
    estimate = estimator.estimate()
    assert (estimate.g2, estimate.tr_s) == (pytest.approx(11 / 7), pytest.approx(18 / 7))


def test_changing_batch_sizes_leave_the_estimate_unbiased():
    generator = np.random.default_rng(3)
    estimator = NoiseScaleEstimator(decay=1.0)
    for step in range(2000):
        num_small = (2, 4, 8)[step % 3]
        gradients = np.eye(DIM)[0] + generator.standard_normal((num_small, DIM)) * math.sqrt(32 / DIM / SMALL)
        estimator.observe(
            small_sqnorm=float(np.sum(gradients**2, -1).mean()),
            small_batch=SMALL,
            big_sqnorm=float(np.sum(gradients.mean(0) ** 2)),
            big_batch=SMALL * num_small,
        )
    low, high = estimator.estimate().interval
    assert low < 32 < high < 36


def test_forgetting_follows_a_noise_scale_that_moves():
    early = gaussian_norms(tr_sigma=16.0, num_runs=1, num_steps=300, seed=4)
    late = gaussian_norms(tr_sigma=128.0, num_runs=1, num_steps=300, seed=5)
    small, big = np.concatenate([early[0][0], late[0][0]]), np.concatenate([early[1][0], late[1][0]])
    low, high = estimator_of(small.tolist(), big.tolist(), decay=0.98).estimate().interval
    assert low < 128 < high
    assert low > 64


def test_resume_is_bit_exact_through_json():
    small, big = gaussian_norms(tr_sigma=64.0, num_runs=1, num_steps=60, seed=6)
    straight = estimator_of(small[0].tolist(), big[0].tolist())
    first = estimator_of(small[0, :23].tolist(), big[0, :23].tolist())
    resumed = NoiseScaleEstimator()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for small_sqnorm, big_sqnorm in zip(small[0, 23:].tolist(), big[0, 23:].tolist()):
        resumed.observe(small_sqnorm=small_sqnorm, small_batch=SMALL, big_sqnorm=big_sqnorm, big_batch=BIG)
    assert resumed.estimate() == straight.estimate()
    assert resumed.state_dict() == straight.state_dict()


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match=r"need the keys .* of a noise scale"):
        NoiseScaleEstimator().load_state_dict({"ema": 1.0})


@pytest.mark.parametrize(
    ("norms", "batches", "reason"),
    [
        ((math.nan, 1.0), (1, 2), "30 steps said nothing: the gradient is not finite"),
        ((math.inf, math.inf), (1, 2), "the gradient is not finite"),
        ((0.0, 0.0), (1, 2), "the gradient is 0"),
        ((2.0, 2.0), (8, 8), "only one gradient of 8 per step .*accumulate at least two"),
        ((2.0, 2.0), (1, 2), "do not differ: no noise, or all workers see the same examples"),
        ((2.0, 0.5), (1, 2), "negative beyond its error"),
    ],
)
def test_what_says_nothing_gives_a_reason_and_no_number(norms, batches, reason):
    estimator = NoiseScaleEstimator()
    for _ in range(30):
        estimator.observe(
            small_sqnorm=norms[0], small_batch=batches[0], big_sqnorm=norms[1], big_batch=batches[1]
        )
    estimate = estimator.estimate()
    assert not estimate.reliable
    assert math.isnan(estimate.value)
    assert estimate.interval == (0.0, math.inf)
    assert recommended_batch(estimate).batch is None
    assert re.search(reason, estimate.reason)


def test_too_few_observations_give_no_number():
    small, big = gaussian_norms(tr_sigma=4.0, num_runs=1, num_steps=19, seed=7)
    for num_observations in (0, 19):
        estimator = estimator_of(small[0, :num_observations].tolist(), big[0, :num_observations].tolist())
        assert math.isnan(estimator.estimate().value)
        assert "effective observations; 20 are needed" in estimator.estimate().reason


def test_a_step_that_overflowed_does_not_poison_the_others():
    small, big = gaussian_norms(tr_sigma=64.0, num_runs=1, num_steps=60, seed=8)
    clean = estimator_of(small[0].tolist(), big[0].tolist())
    small, big = small[0].tolist(), big[0].tolist()
    small.insert(30, math.inf)
    big.insert(30, math.nan)
    assert estimator_of(small, big).estimate() == clean.estimate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"small_batch": 4, "big_batch": 2}, "need 0 < small_batch <= big_batch, got small_batch=4"),
        ({"small_batch": 0, "big_batch": 2}, "small_batch=0"),
        ({"small_sqnorm": -1.0}, "a squared norm is negative: small -1.0"),
    ],
)
def test_impossible_observations_are_refused(arguments, message):
    good = {"small_sqnorm": 1.0, "small_batch": 1, "big_sqnorm": 1.0, "big_batch": 2}
    with pytest.raises(ValueError, match=message):
        NoiseScaleEstimator().observe(**{**good, **arguments})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
        ({"confidence": 95.0}, r"confidence must be in \(0, 1\), got 95.0"),
        ({"min_observations": 2}, "min_observations must be at least 5"),
        ({"max_interval_ratio": 1.0}, "max_interval_ratio must be > 1"),
        ({"decay": 0.5}, "averages over 3.0 observations, fewer than min_observations = 20"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseScaleEstimator(**settings)


def known(value, low, high, *, reliable=True):
    return NoiseScale(value, (low, high), reliable, "because", 1.0, value, 100)


@pytest.mark.parametrize(
    ("value", "multiple_of", "batch"),
    [(1000.0, 1, 512), (1024.0, 1, 1024), (1000.0, 24, 768), (30.0, 24, 24), (10.0, 24, 24), (1.5, 1, 1)],
)
def test_recommended_batch_is_the_largest_multiple_of_a_power_of_two_below_the_noise_scale(
    value, multiple_of, batch
):
    assert recommended_batch(known(value, value / 1.5, value * 1.5), multiple_of=multiple_of).batch == batch


def test_an_unreliable_estimate_recommends_nothing_and_says_what_would_help():
    small, big = gaussian_norms(tr_sigma=1024.0, num_runs=1, num_steps=40, seed=9)
    estimate = estimator_of(small[0].tolist(), big[0].tolist()).estimate()
    advice = recommended_batch(estimate)
    assert advice.batch is None
    assert f"at least {estimate.interval[0]:.3g}" in advice.reason
    assert re.search(
        r"it takes (at least )?about \d+ steps of this kind.* or .*about \d+ with \d+ times", advice.reason
    )


def share_reliable(*, tr_sigma, num_steps, times, seed):
    """Of 60 runs with `times` the accumulation."""
    num_small = NUM_SMALL * times
    small, big = gaussian_norms(
        tr_sigma=tr_sigma, num_runs=60, num_steps=num_steps, seed=seed, num_small=num_small
    )
    reliable = 0
    for run in range(60):
        estimator = NoiseScaleEstimator(decay=1.0)
        for small_sqnorm, big_sqnorm in zip(small[run].tolist(), big[run].tolist()):
            estimator.observe(
                small_sqnorm=small_sqnorm,
                small_batch=SMALL,
                big_sqnorm=big_sqnorm,
                big_batch=SMALL * num_small,
            )
        reliable += estimator.estimate().reliable
    return reliable / 60


def test_what_an_unreliable_estimate_asks_for_is_what_it_takes():
    # A noise scale of 6 big batches after 60 steps; half of what is asked for is too little, twice is enough.
    tr_sigma = 6.0 * BIG
    small, big = gaussian_norms(tr_sigma=tr_sigma, num_runs=60, num_steps=60, seed=10)
    asked = []
    for run in range(60):
        estimate = estimator_of(small[run].tolist(), big[run].tolist(), decay=1.0).estimate()
        found = re.search(
            r"it takes about (\d+) steps of this kind, or about (\d+) with (\d+) times", estimate.reason
        )
        if found:
            asked.append([int(number) for number in found.groups()])
    assert len(asked) > 30
    steps, fewer, times = (int(np.median(column)) for column in zip(*asked))
    assert fewer * times < steps  # accumulating also takes fewer examples
    for num_steps, by in ((steps, 1), (fewer, times)):
        assert share_reliable(tr_sigma=tr_sigma, num_steps=2 * num_steps, times=by, seed=11) > 0.7
        assert share_reliable(tr_sigma=tr_sigma, num_steps=max(num_steps // 3, 20), times=by, seed=12) < 0.4
