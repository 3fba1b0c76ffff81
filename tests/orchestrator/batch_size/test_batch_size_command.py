"""`lowtide batch-size`: the probe, the sweep, branches, kill and resume, and a sentence for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.backends.local_tasks import local_tasks
from orchestrator.backends.protocol import RunFailedError
from orchestrator.batch_size.results_file import ResultsFile, SweepFound
from orchestrator.cli import app
from orchestrator.job import JobSpec

COMMAND = [sys.executable, "-m", "orchestrator.cli", "batch-size"]
SWEEP = (
    "--sweep",
    "--target-loss",
    "0.8",
    "--batches",
    "4,16,64",
    "--rates",
    "0.2,0.4,0.8",
    "--parallel",
    "1",
)
RESULTS = Path("runs/tiny-batch-size.json")


def batch_size(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["batch-size", *map(str, words)])


def refused(*words: str | Path, status: int = 2) -> str:
    """The sentence of a command that must not succeed."""
    result = batch_size(*words)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", "").split())


@pytest.fixture
def job(write_job: Any) -> Path:
    """A perceptron without dropout on 400 samples, plain SGD."""
    return sgd_job(write_job)


def sgd_job(write_job: Any, *, rate: float = 0.2, **train: Any) -> Path:
    return write_job(
        model={"target": "tiny.py:net", "kwargs": {"dropout": 0.0}},
        batch={"inputs": {"shape": [8, 8]}, "targets": {"shape": [8], "dtype": "int64", "high": 4}},
        optimizer={"name": "sgd", "lr": rate},
        train={"data": {"target": "tiny.py:data", "kwargs": {"samples": 400}}, "steps": 200, **train},
    )


def test_the_probe_says_the_noise_scale_a_verdict_a_batch_a_rate_and_what_is_next(job: Path):
    result = batch_size(job, "--time-limit", "20s")
    assert result.exit_code == 0, result.output
    heads = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert heads == ["noise scale", "verdict", "recommended", "next", "next", "results"]
    # The loss of now is no target: it is reached in a few steps, at any batch.
    assert "--sweep --target-loss LOSS: one the job reaches, far below" in result.stdout
    answer = json.loads(batch_size(job, "--time-limit", "20s", "--json").stdout)
    noise, recommended = answer["noise_scale"], answer["recommended"]
    assert noise["low"] < noise["value"] < noise["high"]
    # SGD: linear from the job's rate of 0.2 at its batch of 8
    assert recommended["rate"] == pytest.approx(0.2 * recommended["batch"] / 8)
    assert recommended["batch"] <= noise["value"] or recommended["batch"] == 8


def test_the_probe_keeps_its_time_and_says_what_it_could_not_find(job: Path):
    started_s = time.monotonic()
    result = batch_size(job, "--time-limit", "10ms")
    assert time.monotonic() - started_s < 10
    assert result.exit_code == 1
    assert "verdict              unreliable" in result.stdout
    assert "--time-limit 0.04s" in result.stdout
    assert "recommended" not in result.stdout


def test_a_sweep_fits_draws_and_goes_on_without_running_anything_twice(job: Path):
    first = batch_size(job, *SWEEP, "--picture", "sweep.png", "--json")
    assert first.exit_code in (0, 1), first.output  # three batch sizes give a wide interval
    answer = json.loads(first.stdout)
    assert [row["batch"] for row in answer["table"]] == [4, 16, 64]
    assert all(row["reached"] for row in answer["table"])
    assert answer["fit"]["s_min"] < answer["table"][-1]["steps"]
    assert answer["noise_scale_mean"] > 0
    assert answer["noise_scale"][0]["step"] == 0
    assert Path("sweep.png").stat().st_size > 10_000
    kept = json.loads(RESULTS.read_text())["sweep"]
    assert len(kept["runs"]) == 9
    assert {(run["batch"], run["rate"]) for run in kept["runs"]} == {
        (batch, rate) for batch in (4, 16, 64) for rate in (0.2, 0.4, 0.8)
    }
    again = batch_size(job, *SWEEP, "--json")
    assert json.loads(again.stdout) == answer
    assert json.loads(RESULTS.read_text())["sweep"] == kept
    assert "run 10" not in again.stderr
    more = batch_size(job, *SWEEP[:4], "4,16,64,128", *SWEEP[5:], "--json")
    assert json.loads(RESULTS.read_text())["sweep"]["runs"][:9] == kept["runs"]
    assert [row["batch"] for row in json.loads(more.stdout)["table"]] == [4, 16, 64, 128]


def test_two_processes_find_what_one_finds(job: Path):
    words = ["--target-loss", "0.8", "--batches", "4,16,64", "--rates", "0.4", "--quiet", "--json"]
    one = json.loads(batch_size(job, "--sweep", *words, "--parallel", "1", "--out", "one.json").stdout)
    two = json.loads(batch_size(job, "--sweep", *words, "--parallel", "2", "--out", "two.json").stdout)
    assert one["table"] == two["table"]


@pytest.mark.slow
def test_a_killed_sweep_keeps_its_runs_and_ends_as_an_undisturbed_one(job: Path):
    words = [str(job), *SWEEP, "--seeds", "2", "--quiet"]
    undisturbed = batch_size(*words, "--out", "whole.json")
    assert undisturbed.exit_code in (0, 1)
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not (RESULTS.exists() and len(json.loads(RESULTS.read_text())["sweep"]["runs"]) >= 2):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = json.loads(RESULTS.read_text())["sweep"]["runs"]
    assert batch_size(*words).exit_code == undisturbed.exit_code
    found = json.loads(RESULTS.read_text())["sweep"]
    assert found["runs"][: len(kept)] == kept
    assert found == json.loads(Path("whole.json").read_text())["sweep"]


def test_branches_continue_the_optimizer_that_is_at_work(write_job: Any):
    job = write_job(
        model={"target": "tiny.py:net", "kwargs": {"dropout": 0.0}},
        batch={"inputs": {"shape": [8, 8]}, "targets": {"shape": [8], "dtype": "int64", "high": 4}},
        optimizer={"name": "adamw", "lr": 0.01, "then": {"name": "sgd", "lr": 0.4, "start": 0.5}},
        train={
            "data": {"target": "tiny.py:data", "kwargs": {"samples": 400}},
            "steps": 20, "checkpoint_every": 5, "keep_checkpoints": 4,
        },
    )  # fmt: skip
    assert CliRunner().invoke(app, ["train", str(job), "--quiet"]).exit_code == 0
    (folder,) = [path for path in Path("runs").iterdir() if path.is_dir()]
    # The rates of 2 x the batch: AdamW's grows with the square root, SGD's in proportion.
    for step, factor in ((5, 2**0.5), (15, 2.0)):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        words = ("--branched", "--factors", "2", "--window", "8", "--seeds", "2", "--parallel", "1")
        result = batch_size(job, *words, "--checkpoint", checkpoint, "--out", f"{step}.json")
        assert result.exit_code in (0, 1), result.output
        runs = json.loads(Path(f"{step}.json").read_text())["branched"]["runs"]
        rates = {run["factor"]: run["rate"] for run in runs}
        assert rates[2] == pytest.approx(factor * rates[1])


def test_branches_of_a_checkpoint_find_a_factor_and_are_not_run_again(write_job: Any):
    job = sgd_job(write_job, steps=40, checkpoint_every=10, keep_checkpoints=4)
    runner = CliRunner()
    assert runner.invoke(app, ["train", str(job), "--quiet"]).exit_code == 0
    (folder,) = [path for path in Path("runs").iterdir() if path.is_dir()]
    words = (
        "--branched", "--factors", "2,4,40", "--window", "40", "--seeds", "3", "--parallel", "1", "--json",
        "--checkpoint", folder / "checkpoints" / "step-00000010",
    )  # fmt: skip
    result = batch_size(job, *words, "--picture", "branches.png")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["factor"] >= 2  # at a batch of 8, twice as many lose nothing
    assert answer["batch"] == 8 * answer["factor"]
    assert answer["recommended"]["rate"] == pytest.approx(
        answer["factor"] * json.loads(RESULTS.read_text())["branched"]["runs"][0]["rate"]
    )
    runs = json.loads(RESULTS.read_text())["branched"]["runs"]
    assert json.loads(batch_size(job, *words).stdout) == answer
    assert json.loads(RESULTS.read_text())["branched"]["runs"] == runs
    # The schedule of the job ends at a rate of 0.
    assert "its rate is 0, so nothing moves" in refused(
        job, "--branched", "--checkpoint", folder, "--out", "x.json"
    )
    assert "branches of another checkpoint or window" in refused(job, *words[:4], "80", *words[5:])
    # A probe of the same checkpoint
    probed = batch_size(job, "--checkpoint", words[-1], "--json", "--time-limit", "20s")
    assert json.loads(probed.stdout)["noise_scale"]["step"] == 10


def test_a_checkpoint_of_another_model_gets_a_sentence(write_job: Any):
    train = {"steps": 4, "checkpoint_every": 2, "schedule": {"name": "constant"}}
    assert CliRunner().invoke(app, ["train", str(sgd_job(write_job, **train)), "--quiet"]).exit_code == 0
    (folder,) = [path for path in Path("runs").iterdir() if path.is_dir()]
    other = write_job(
        optimizer={"name": "sgd", "lr": 0.2}, model={"target": "tiny.py:net", "kwargs": {"width": 8}}
    )
    assert "is not of this model and optimizer" in refused(other, "--checkpoint", folder)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sweep"], "--sweep needs --target-loss"),
        (["--sweep", "--target-loss", "nan"], "--target-loss must be a finite number"),
        (["--sweep", "--target-loss", "0.5", "--batches", "64"], "at least three batch sizes"),
        (["--sweep", "--target-loss", "0.5", "--batches", "4,8,0"], "--batches must list whole numbers from 1"),
        (["--sweep", "--target-loss", "0.5", "--batches", "4,8,900"], "more than the 400 samples"),
        (["--sweep", "--target-loss", "0.5", "--rates", "0.1,-1"], "--rates must list numbers above 0"),
        (["--sweep", "--target-loss", "9", "--parallel", "1"], "is reached by new weights"),
        (["--sweep", "--branched"], "different questions"),
        (["--sweep", "--target-loss", "0.5", "--checkpoint", "x"], "--sweep starts from new weights"),
        (["--target-loss", "0.5"], "go with --sweep"),
        (["--branched"], "--branched needs --checkpoint RUN_DIR"),
        (["--branched", "--checkpoint", "none"], "there is no whole checkpoint in it"),
        (["--branched", "--checkpoint", "none", "--seeds", "1"], "at least 2 --seeds"),
        (["--branched", "--checkpoint", "none", "--window", "5"], "must be a multiple of each of --factors"),
        (["--checkpoint", "none"], "there is no whole checkpoint in it"),
        (["--time-limit", "5"], "has no unit"),
        (["--time-limit", "0s"], "--time-limit must be more than 0"),
        (["--picture", "x.png"], "--picture goes with --sweep or --branched"),
        (["--address", "auto"], "--address needs train.backend 'ray'"),
        (["--out", "no/folder.json"], "there is no folder"),
    ],
)  # fmt: skip
def test_bad_usage_gets_a_sentence_and_status_2(job: Path, words: list[str], expected: str):
    assert expected in refused(job, *words)


def test_a_job_of_planning_only_is_refused(job: Path):
    data = json.loads(job.read_text())
    del data["train"]
    job.write_text(json.dumps(data))
    assert "has no part `train`" in refused(job)


def test_a_target_that_no_run_reaches_is_told_with_the_nearest_loss(job: Path):
    words = (
        "--sweep", "--target-loss", "1e-9", "--batches", "32,64,128", "--rates", "0.2", "--max-steps", "3",
        "--parallel", "1", "--quiet",
    )  # fmt: skip
    sentence = refused(job, *words, status=1)
    assert "none of 3 runs reached the target loss of 1e-09; the lowest was" in sentence
    assert "Raise --target-loss or --max-steps" in sentence


def test_batches_are_not_blamed_for_rates_that_end_too_soon(job: Path):
    result = batch_size(
        job, "--sweep", "--target-loss", "0.8", "--batches", "16,32,64", "--rates", "0.4", "--parallel", "1"
    )
    assert "add --rates beyond it" in result.stdout
    assert result.exit_code == 1
    assert "but first mend the rates: the best one is the last one tried at batch 16" in result.stderr


def test_losses_that_are_not_finite_are_told(write_job: Any):
    job = sgd_job(write_job, rate=1e30)
    words = (
        "--sweep",
        "--target-loss",
        "0.5",
        "--batches",
        "32,64,128",
        "--rates",
        "1e30",
        "--parallel",
        "1",
    )
    assert "all 3 runs diverged. Give lower --rates" in refused(job, *words, "--quiet", status=1)
    assert "is not finite" in refused(job, status=1)


def test_a_damaged_or_foreign_file_of_results_is_left_as_it_is(job: Path, write_job: Any):
    words = ("--sweep", "--target-loss", "0.8", "--batches", "16,32,64", "--rates", "0.4", "--parallel", "1")
    batch_size(job, *words, "--quiet")
    whole = RESULTS.read_text()
    assert "holds a sweep to loss 0.8" in refused(job, *words[:2], "0.7", *words[3:])
    other = sgd_job(write_job, rate=0.1)
    assert "holds the runs of another job: it differs in optimizer" in refused(other, *words)
    assert RESULTS.read_text() == whole
    job = sgd_job(write_job)
    for damaged in (whole[: len(whole) // 2], "{}", '"no"', whole.replace('"steps":', '"stops":', 1)):
        RESULTS.write_text(damaged)
        assert "was left as it is" in refused(job, *words)
        assert RESULTS.read_text() == damaged


def test_two_commands_at_once_do_not_undo_each_others_runs(job: Path):
    spec = JobSpec.load(job)
    one, two = ResultsFile(RESULTS, spec), ResultsFile(RESULTS, spec)
    one.change(sweep=SweepFound(target_loss=0.5, num_evaluated=9))
    with pytest.raises(ValueError, match="changed by another command meanwhile"):
        two.change(sweep=SweepFound(target_loss=0.6, num_evaluated=9))
    found = ResultsFile(RESULTS, spec).found.sweep
    assert found is not None
    assert found.target_loss == 0.5


def test_a_model_that_fails_on_its_data_gets_a_sentence(write_job: Any):
    job = write_job(
        model="tiny.py:Crossed", train={"data": "tiny.py:net"}, optimizer={"name": "sgd", "lr": 0.1}
    )
    words = ("--sweep", "--target-loss", "0.5", "--batches", "4,8,16", "--parallel", "1")
    assert "must return the pair (training set, validation set)" in refused(job, *words)


def test_the_help_shows_an_example():
    result = batch_size("--help")
    assert result.exit_code == 0
    assert "Example: lowtide batch-size deploy/jobs/quickstart.yaml" in result.stdout


def double(task: int) -> int:
    if task < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


def test_tasks_run_in_processes_and_a_lost_process_is_told():
    with local_tasks(double, num_slots=2) as pool:
        for task in (1, 2):
            pool.submit(task)
        assert {pool.next_result(), pool.next_result()} == {(1, 2), (2, 4)}
        pool.submit(-1)
        with pytest.raises(RunFailedError, match="was ended by SIGKILL"):
            pool.next_result()
