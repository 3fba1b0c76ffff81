"""Which runs a sweep makes: on runs whose steps follow a law, so that the best rate and the curve are known."""

import math

import pytest

from orchestrator.batch_size.critical_batch import fit_critical_batch
from orchestrator.batch_size.report import mean_noise
from orchestrator.batch_size.results_file import Noise, SweepRun
from orchestrator.batch_size.sweep import Grid, Sweep, at_edge, best_run, outcomes

BATCHES = (4, 16, 64, 256, 1024)


def grid(**changes):
    settings = {
        "batches": BATCHES, "own_batch": 64, "own_rate": 0.25, "rule": "linear", "rates": (), "seeds": (0,),
        "max_steps": 4000,
    }  # fmt: skip
    return Grid(**{**settings, **changes})


def best_rate(batch):
    """eps_max / (1 + B_noise / B) with eps_max = 1 and B_noise = 100."""
    return 1 / (1 + 100 / batch)


def steps_at(batch, rate):
    """Steps at a rate: least at the best one, (1 + x^2) times that x octaves away; diverged two octaves above."""
    octaves = math.log2(rate / best_rate(batch))
    return math.inf if octaves > 2 else 50 * (1 + 100 / batch) * (1 + octaves**2)


def run(cell):
    """A run of a cell as it would end."""
    steps = steps_at(cell.batch, cell.rate)
    curve = tuple((k, math.exp(-k / min(steps, 1e6))) for k in range(0, 100, 10))
    if math.isinf(steps):
        outcome, done = "diverged", 3
    elif steps <= cell.limit:
        outcome, done = "reached", round(steps)
    else:
        outcome, done = "limit", cell.limit
    return SweepRun(
        batch=cell.batch, rate=cell.rate, seed=cell.seed, limit=cell.limit, outcome=outcome, steps=done, curve=curve
    )  # fmt: skip


def finished(sweep, num_slots=1):
    """Run cells until none is left, `num_slots` at a time."""
    running = []
    while True:
        while len(running) < num_slots and (cell := sweep.next_cell(running)) is not None:
            running.append(cell)
        if not running:
            return sweep
        sweep.add(run(running.pop(0)))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_each_batch_is_judged_at_its_best_rate_and_no_cell_runs_twice(num_slots):
    sweep = finished(Sweep(grid(), []), num_slots)
    for batch in BATCHES:
        best = best_run(sweep.runs, batch, first_seed=0)
        assert best is not None
        assert abs(math.log2(best.rate / best_rate(batch))) <= 0.51  # half an octave: rates are powers of two
    cells = [(one.batch, one.rate, one.seed) for one in sweep.runs]
    assert len(cells) == len(set(cells))
    assert at_edge(sweep.runs, first_seed=0) == []
    fit = fit_critical_batch(outcomes(sweep.runs, first_seed=0))
    assert fit.b_crit_interval[0] <= 100 <= fit.b_crit_interval[1]


def test_a_sweep_goes_on_from_any_of_its_runs_to_the_same_end():
    whole = finished(Sweep(grid(), [])).runs
    for count in range(0, len(whole), 3):
        assert finished(Sweep(grid(), whole[:count])).runs == whole


def test_a_run_may_take_no_longer_than_the_best_of_its_batch():
    sweep = Sweep(grid(), [])
    sweep = finished(sweep)
    seen: dict[int, int] = {}
    for one in sweep.runs:
        assert one.limit <= seen.get(one.batch, 10**9)
        if one.outcome == "reached":
            seen[one.batch] = min(seen.get(one.batch, 10**9), one.steps)


def test_what_other_batches_took_bounds_a_batch_of_which_nothing_is_known():
    cell = Sweep(grid(), []).next_cell(())
    assert cell is not None
    assert (cell.batch, cell.limit) == (64, 4000)
    sweep = Sweep(grid(), [run(cell)])
    reached = sweep.runs[0].steps
    assert sweep.limit(1024) == 2 * reached  # a larger batch needs no more steps
    assert sweep.limit(16) == 4 * 2 * reached  # a smaller one no more examples
    assert Sweep(grid(), []).limit(4) == 16 * 4000


def test_rates_that_are_given_are_the_only_ones_and_an_edge_is_told():
    sweep = finished(Sweep(grid(rates=(0.0625, 0.125)), []))
    assert {one.rate for one in sweep.runs} == {0.0625, 0.125}
    assert at_edge(sweep.runs, first_seed=0) == list(BATCHES)  # of two rates the best one is always the last


def test_rates_far_off_are_left_in_either_direction():
    for start in (2.0**-8, 2.0**6):
        sweep = finished(Sweep(grid(own_rate=start), []))
        best = best_run(sweep.runs, 64, first_seed=0)
        assert best is not None
        assert abs(math.log2(best.rate / best_rate(64))) <= 0.51


def test_other_seeds_run_at_the_best_rate_alone():
    sweep = finished(Sweep(grid(seeds=(0, 1, 2)), []))
    for batch in BATCHES:
        best = best_run(sweep.runs, batch, first_seed=0)
        assert best is not None
        others = [one for one in sweep.runs if one.batch == batch and one.seed != 0]
        assert sorted(one.seed for one in others) == [1, 2]
        assert {one.rate for one in others} == {best.rate}


def test_a_batch_without_a_run_to_the_target_counts_by_its_limit_and_a_diverged_one_not():
    def one(batch, outcome, steps):
        return SweepRun(
            batch=batch, rate=0.1, seed=0, limit=steps, outcome=outcome, steps=steps, curve=((0, 1.0),)
        )

    found = outcomes([one(4, "limit", 900), one(8, "diverged", 3), one(16, "reached", 50)], first_seed=0)
    assert [(part.batch, part.steps, part.reached) for part in found] == [(4, 900, False), (16, 50, True)]


def test_a_grid_of_one_or_two_batches_is_refused():
    with pytest.raises(ValueError, match="at least three batch sizes"):
        grid(batches=(64,))
    with pytest.raises(ValueError, match="at least three batch sizes"):
        grid(batches=(64, 64, 128))


def test_the_noise_along_a_run_is_averaged_as_the_critical_batch_averages_it():
    # Noise 100 for the first half of the progress, 900 for the second. At batch 100 a step makes 1/2 of the
    # progress of one at an infinite batch, then 1/10: 20 steps, then 100, for a progress of 10 each. At any fixed
    # batch B the whole takes 10 (1 + 100 / B) + 10 (1 + 900 / B) = 20 (1 + 500 / B) steps, so that B_crit is 500.
    # The step at the border counts for both halves by half, which is 1 % of 20 steps.
    def noise(step, value):
        return Noise(step=step, loss=1.0, value=value, low=1.0, high=None, reliable=True)

    points = [noise(step, 100.0 if step <= 20 else 900.0) for step in range(0, 121)]
    assert mean_noise(points, batch=100) == pytest.approx(500, rel=0.02)
    assert mean_noise(points) == pytest.approx((20 * 100 + 100 * 900) / 120, rel=0.01)
    assert mean_noise([noise(0, None)], batch=100) is None
