"""The command: results on stdout, sentences on stderr, and exit statuses."""

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

from orchestrator.cli import app

STEP_KEYS = {
    "step", "loss", "measured_peak_bytes", "predicted_peak_bytes", "noise_scale", "noise_scale_interval"
}  # fmt: skip
COMMAND = [sys.executable, "-m", "orchestrator.cli"]


def lowtide(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: str | Path, status: int = 2) -> str:
    """The sentence of a command that must not succeed."""
    result = lowtide(*words)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_training_leaves_a_run_folder_and_says_what_came_of_it(write_job: Any, tmp_path: Path):
    result = lowtide("train", write_job(budget="1MiB"))
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "plan.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "run.json",
        "memory.png",
        "loss.png",
    }
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "everything retained", "budget", "predicted peak", "extra time", "solver",
        "validation loss", "recommended batch", "run folder",
    ]  # fmt: skip
    assert lines[-1].endswith(str(folder))
    assert "step 9/9  loss" in result.stderr
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["overrides"] == {}
    assert record["result"]["finished"] is True


def test_json_is_one_object_a_step_and_one_at_the_end(write_job: Any):
    result = lowtide("train", write_job(), "--json", "--steps", "3", "--seed", "5")
    assert result.exit_code == 0, result.output
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(part["event"], part["step"]) for part in objects] == [
        ("step", 1), ("step", 2), ("step", 3), ("end", 3)
    ]  # fmt: skip
    assert all(part.keys() >= STEP_KEYS for part in objects)
    run_dir = Path(objects[-1]["run_dir"])
    assert json.loads((run_dir / "run.json").read_text())["seed"] == 5
    assert result.stderr == ""


def test_a_change_of_the_optimizer_is_told_once_and_leaves_the_answer_as_it_is(
    write_job: Any, tmp_path: Path
):
    sgd = {"name": "sgd", "lr": 0.2, "momentum": 0.9, "start": 0.5}
    path = write_job(optimizer={"name": "adamw", "lr": 0.01, "then": sgd})
    result = lowtide("train", path)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("step 5: sgd goes on, at learning rate") == 1
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == [
        "validation loss", "recommended batch", "run folder"
    ]  # fmt: skip
    (folder,) = (tmp_path / "runs").iterdir()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "optimizer"] == [5]
    objects = [json.loads(line) for line in lowtide("train", path, "--json").stdout.splitlines()]
    assert [(part["event"], part["step"]) for part in objects] == [
        *(("step", at) for at in range(1, 10)),
        ("end", 9),
    ]
    assert all(part.keys() >= STEP_KEYS for part in objects)


def test_quiet_training_says_only_its_results(write_job: Any):
    result = lowtide("train", write_job(), "--quiet", "--steps", "2")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "run folder" in result.stdout


def test_a_continued_run_keeps_the_settings_of_the_command_line(write_job: Any, tmp_path: Path):
    path = write_job()
    assert lowtide("train", path, "--steps", "4", "--run-dir", tmp_path / "mine").exit_code == 0
    (folder,) = (tmp_path / "mine").iterdir()
    again = lowtide("train", path, "--resume", folder, "--json")
    assert again.exit_code == 0, again.output
    (end,) = [json.loads(line) for line in again.stdout.splitlines()]
    assert (end["step"], end["run_dir"]) == (4, str(folder))
    assert "the job now differs in train.steps" in refused("train", path, "--resume", folder, "--steps", "5")


def test_a_budget_that_no_plan_meets_is_answered_with_the_smallest_that_works(write_job: Any, tmp_path: Path):
    result = lowtide("train", write_job(), "--budget", "2KiB", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["event"] == "error"
    assert answer["smallest_feasible_bytes"] > 2048
    assert "held up by" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_plan_is_written_and_printed(write_job: Any, tmp_path: Path):
    result = lowtide("plan", write_job(), "--budget", "1MiB", "--json", "--out", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["status"] == "optimal"
    assert answer["budget_bytes"] == 1 << 20
    assert json.loads((tmp_path / "plan.json").read_text())["graph_hash"] == answer["graph_hash"]


def test_a_job_is_planned_by_the_solver_that_is_asked(write_job: Any):
    answer = json.loads(
        lowtide("plan", write_job(), "--budget", "none", "--solver", "retain_all", "--json").stdout
    )
    assert answer["solver"] == "retain_all"
    path = write_job(solver={"name": "materialization", "time_limit": "5s"})
    answer = json.loads(lowtide("plan", path, "--budget", "90% of activations", "--json").stdout)
    assert answer["solver"] == "materialization"
    assert "unknown solver 'best'" in refused("plan", write_job(solver={"name": "best"}))


def test_the_smallest_budget_of_a_job_is_one_that_works(write_job: Any, tmp_path: Path):
    words = ["--smallest", "--time-limit", "2s", "--json", "--out", tmp_path / "plan.json"]
    answer = json.loads(lowtide("plan", write_job(), *words).stdout)
    smallest = answer["smallest_feasible_bytes"]
    assert smallest >= answer["least_need_bytes"]
    assert json.loads((tmp_path / "plan.json").read_text())["predicted_peak_bytes"] == smallest
    assert lowtide("plan", write_job(), "--budget", f"{smallest}B").exit_code == 0


def test_a_plan_counts_the_ranks_and_micro_batches_of_the_job(write_job: Any):
    def peak(**train: int) -> int:
        result = lowtide("plan", write_job(train=train), "--budget", "1MiB", "--json")
        return json.loads(result.stdout)["peak_bytes"]

    # 212 parameters of the net 8-16-4 lie in gradient buckets once there are two ranks.
    assert peak(workers=2) - peak() >= 212 * 4 - 200
    assert peak(accumulation=2) >= peak()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "none.yaml"], "none.yaml cannot be read"),
        (["train", "job.yaml", "--budget", "4"], "the size has no unit: got '4'"),
        (["train", "job.yaml", "--steps", "-1"], "train.steps: input should be greater than or equal to 1"),
        (["train", "job.yaml", "--backend", "slurm"], "train.backend: input should be 'ray' or 'local'"),
        (["train", "job.yaml", "--resume", "."], "there is no run.json of an earlier run in it"),
        (["train", "job.yaml", "--address", "auto"], "--address needs train.backend 'ray'"),
        (["train", "job.yaml", "--backend", "ray", "--address", "head"], "must be HOST:PORT or auto"),
        (["train", "job.yaml", "--backend", "ray", "--address", "http://a:1"], "lowtide submit"),
        (["plan", "job.yaml", "--hardware", "h100"], "h100-sxm"),
        (["plan", "job.yaml", "--budget", "lots"], "is not a number with a unit"),
        (["submit", "job.yaml", "--address", "127.0.0.1:8265"], "an address like http://HOST:8265"),
        (["train"], "Missing argument"),
        (["train", "job.yaml", "--speed", "9"], "No such option"),
    ],
)
def test_bad_usage_gets_a_sentence_and_status_2(write_job: Any, words: list[str], expected: str):
    write_job()
    assert expected in " ".join(refused(*words).replace("│", "").split())


def test_a_model_that_does_not_import_gets_a_sentence(write_job: Any):
    assert "does not import" in refused("plan", write_job(model="no_such_module:net"), "--budget", "60%")
    path = write_job(model="no_such_module:net")
    assert "does not import" in lowtide("train", path, "--quiet").stderr


def test_a_closed_port_is_said_within_seconds(write_job: Any):
    path = write_job()
    started_s = time.monotonic()
    train = refused("train", path, "--backend", "ray", "--address", "127.0.0.1:1")
    submit = refused("submit", path, "--address", "http://127.0.0.1:1")
    assert time.monotonic() - started_s < 5
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in train
    assert "no Ray Jobs API answers at http://127.0.0.1:1" in submit


def test_help_of_every_verb_shows_an_example():
    for verb in ("train", "plan", "explain", "submit", "status", "logs", "stop", "list"):
        result = lowtide(verb, "--help")
        assert result.exit_code == 0
        assert f"Example: lowtide {verb}" in result.stdout


def test_help_and_refusals_load_neither_torch_nor_ray(write_job: Any):
    code = (
        "import sys; from typer.testing import CliRunner; from orchestrator.cli import app;"
        "run = CliRunner().invoke;"
        "assert run(app, ['--help']).exit_code == 0; assert run(app, ['train', 'none.yaml']).exit_code == 2;"
        "print([name for name in ('torch', 'ray', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_continues_to_the_same_losses(write_job: Any, tmp_path: Path):
    path = write_job(train={"steps": 400, "checkpoint_every": 0})
    command = [*COMMAND, "train", str(path), "--json"]
    undisturbed = subprocess.run(command, capture_output=True, text=True, check=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, complaint = process.communicate(timeout=60)
    stopped = [json.loads(line) for line in [first, *rest.splitlines()]]
    assert process.returncode == 130
    assert f"Continue with: lowtide train {path} --resume" in complaint
    assert stopped[-1]["finished"] is False
    resume = [*command, "--resume", stopped[-1]["run_dir"]]
    resumed = subprocess.run(resume, capture_output=True, text=True, check=True)

    def losses(objects: list[Any]) -> list[float]:
        return [part["loss"] for part in objects if part["event"] == "step"]

    def parsed(text: str) -> list[Any]:
        return [json.loads(line) for line in text.splitlines()]

    assert losses(stopped) + losses(parsed(resumed.stdout)) == losses(parsed(undisturbed.stdout))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(write_job: Any):
    path = write_job(train={"steps": 1_000_000})
    process = subprocess.Popen(
        [*COMMAND, "train", str(path), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaint
