"""One short run: how it ends, and what must not change its way."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.batch_size.short_run import RunFailure, RunRequest, RunResult, run_short
from orchestrator.job import JobSpec
from tests.orchestrator.conftest import job_writer

SETTINGS = {"batch": 16, "rate": 0.2, "seed": 0, "limit": 60, "target_loss": None, "num_evaluated": 100}


def request(folder: Path, *, micro_batch=8, dropout=0.1, **changes) -> RunRequest:
    path = job_writer(folder)(
        model={"target": "tiny.py:net", "kwargs": {"dropout": dropout}},
        batch={
            "inputs": {"shape": [micro_batch, 8]},
            "targets": {"shape": [micro_batch], "dtype": "int64", "high": 4},
        },
        optimizer={"name": "sgd", "lr": 0.5},
        train={"data": {"target": "tiny.py:data", "kwargs": {"samples": 400}}, "clip_norm": 10.0},
    )
    job = JobSpec.load(path)
    return RunRequest(job=job.to_data(), folder=str(folder), **{**SETTINGS, **changes})


def ran(made: RunRequest) -> RunResult:
    result = run_short(made)
    assert isinstance(result, RunResult), result
    return result


def test_a_run_ends_at_its_target_or_its_limit(tmp_path):
    whole = ran(request(tmp_path))
    assert (whole.outcome, whole.steps) == ("limit", 60)
    assert whole.curve[0][0] == 0
    step, loss = whole.curve[-8]
    reached = ran(request(tmp_path, target_loss=loss))
    assert (reached.outcome, reached.steps) == ("reached", step)
    assert reached.curve == whole.curve[:-7]


def test_the_way_is_the_same_whatever_the_micro_batch(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = ran(request(tmp_path / "a", micro_batch=16, dropout=0.0))
    two = ran(request(tmp_path / "b", micro_batch=5, dropout=0.0))  # 16 = 5 + 5 + 5 + 1
    assert [loss for _, loss in one.curve] == pytest.approx([loss for _, loss in two.curve], rel=1e-4)


def test_measuring_the_noise_does_not_change_the_way(tmp_path):
    made = request(tmp_path)
    plain, measured = ran(made), ran(replace(made, noise_examples=160))
    assert measured.curve == plain.curve
    assert [point.step for point in measured.noise][:5] == [0, 1, 2, 3, 5]
    assert measured.noise[-1].step == 60
    assert measured.noise[-1].loss == measured.curve[-1][1]


def test_a_run_far_behind_the_best_one_is_ended(tmp_path):
    pace = ran(request(tmp_path)).curve
    slow = ran(request(tmp_path, rate=0.002, pace=pace))
    assert slow.outcome == "hopeless"
    assert 16 <= slow.steps < 30
    # One that is a little slower may still win.
    assert ran(request(tmp_path, rate=0.15, pace=pace)).outcome == "limit"


def test_losses_that_are_not_finite_end_a_run_at_once(tmp_path):
    result = ran(request(tmp_path, rate=1e30))
    assert result.outcome == "diverged"
    assert result.steps <= 3
    assert all(abs(loss) < 1e30 for _, loss in result.curve)


def test_an_uneven_last_batch_of_an_epoch_runs_over_into_the_next(tmp_path):
    assert ran(request(tmp_path, batch=300, limit=4)).steps == 4  # of 400 samples


def test_what_cannot_run_is_a_value_with_a_sentence(tmp_path):
    made = request(tmp_path)
    missing = run_short(replace(made, checkpoint=str(tmp_path / "none")))
    assert isinstance(missing, RunFailure)
    assert missing.bad_input
    data = dict(made.job)
    broken = replace(made, job={**data, "loss": {"target": "torch:dot"}})
    failed = run_short(broken)
    assert isinstance(failed, RunFailure)
    assert not failed.bad_input
    assert failed.message.startswith("the run at batch 16, rate 0.2: RuntimeError")
