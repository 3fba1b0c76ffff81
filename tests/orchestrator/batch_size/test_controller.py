"""The batch that follows the noise: when it changes, and that it does not oscillate."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from orchestrator.batch_size.controller import BatchController
from orchestrator.batch_size.noise_scale import NoiseScale


def controller(**changes: Any) -> BatchController:
    settings: dict[str, Any] = {
        "start": 16, "smallest": 16, "largest": 1024, "rate_batch": 16, "unit": 8, "rule": "linear",
        "share": 0.25, "patience": 20,
    }  # fmt: skip
    return BatchController(**{**settings, **changes})


def noise(
    value: float, *, reliable: bool = True, low: float | None = None, high: float | None = None
) -> NoiseScale:
    ends = (value / 1.5 if low is None else low, value * 1.5 if high is None else high)
    return NoiseScale(value, ends, reliable, "", 1.0, value, 100)


def test_the_batch_doubles_once_what_is_wanted_is_half_a_doubling_more():
    held = controller()
    assert held.decide(noise(90), step=100) is None  # a quarter is 22.5, sqrt(2) * 16 = 22.6
    change = held.decide(noise(91), step=101)
    assert change is not None
    assert (change.before, change.batch, held.batch) == (16, 32, 32)
    assert "noise scale is 91 (between 60.67 and 136.5)" in change.reason


def test_it_doubles_at_most_and_only_after_some_steps():
    held = controller()
    sizes = [(step, change.batch) for step in range(100) if (change := held.decide(noise(1e6), step=step))]
    assert sizes == [(20, 32), (40, 64), (60, 128), (80, 256)]


def test_it_stays_within_its_ends_and_in_whole_micro_batches():
    held = controller(largest=40)
    assert [held.decide(noise(1e6), step=step) is not None for step in (20, 40, 60)] == [True, True, False]
    assert held.batch == 40
    low = controller(start=24, smallest=16, rate_batch=16)
    assert (
        low.decide(noise(1.0), step=20) is None
    )  # half of 24 is 12, of which 8 is whole, below the smallest


@pytest.mark.parametrize(
    "estimate",
    [
        noise(1e6, reliable=False),
        NoiseScale(math.nan, (0.0, math.inf), False, "too few", math.nan, math.nan, 3),
        noise(1.0, reliable=False, low=0.0),
    ],
)
def test_what_is_not_known_changes_nothing(estimate: NoiseScale):
    assert controller().decide(estimate, step=1000) is None


def test_a_noise_without_upper_end_is_at_least_its_lower_end():
    held = controller()
    unbounded = noise(math.nan, reliable=False, low=400.0, high=math.inf)
    change = held.decide(unbounded, step=20)
    assert change is not None
    assert "at least 400" in change.reason
    large = controller(start=1024)
    assert large.decide(noise(math.nan, reliable=False, low=4.0, high=math.inf), step=20) is None


def test_it_halves_where_the_noise_has_fallen_far():
    held = controller(start=128)
    assert held.decide(noise(130), step=20) is None  # 32.5, of which 128 / 4 is less
    change = held.decide(noise(127), step=21)
    assert change is not None
    assert change.batch == 64


@pytest.mark.parametrize("seed", range(5))
def test_estimates_that_jump_within_their_intervals_do_not_make_it_oscillate(seed: int):
    held, generator = controller(), random.Random(seed)
    sizes = [
        change.batch
        for step in range(5000)
        if (change := held.decide(noise(1000 * math.sqrt(3) ** generator.uniform(-1, 1)), step=step))
    ]
    assert sizes == sorted(sizes)
    assert held.batch in (128, 256, 512)


def test_a_noise_that_swings_reverses_it_ever_more_rarely():
    held = controller()
    steps = [
        step
        for step in range(20_000)
        if held.decide(noise(1e6 if held.batch == 16 else 1.0), step=step) is not None
    ]
    assert len(steps) <= 2 + math.log(20_000, 4)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert gaps[1:] == [4 * gap for gap in gaps[:-1]]


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("square root", 2.0), ("none", 1.0)])
def test_the_rate_follows_by_the_rule_from_the_batch_that_it_belongs_to(rule: Any, factor: float):
    assert controller(start=64, rule=rule).rate_factor == factor
    assert controller(start=64, rule=rule, rate_batch=64).rate_factor == 1.0


def test_its_state_means_the_same_for_other_workers():
    held = controller()
    held.decide(noise(1e6), step=20)
    other = controller(unit=16)
    other.load_state_dict(held.state_dict())
    assert (other.batch, other.state_dict()) == (32, held.state_dict())
    with pytest.raises(ValueError, match="a batch of 32, which is no multiple of 24"):
        controller(unit=24, start=24, smallest=24, rate_batch=24).load_state_dict(held.state_dict())
