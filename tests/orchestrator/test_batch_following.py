"""Runs whose batch changes, and runs that go on with other workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.job import JobSpec
from planner.inputs.strict import WorkloadError
from tests.orchestrator.test_local_ranks import Run, stop_at
from tests.orchestrator.test_training import Train, differences, final_state, train

__all__ = ["train"]

PLAIN = {"target": "tiny.py:net", "kwargs": {"dropout": 0.0}}
# Of a linear map of 8 inputs with noise the batch grows soon; the schedule has no warm-up to wait for.
FOLLOWING: dict[str, Any] = {
    "optimizer": {"name": "sgd", "lr": 0.05},
    "train": {
        "steps": 120,
        "batch_size": {"min": 8, "max": 32, "share": 1.0},
        "schedule": {"name": "polynomial", "warmup_fraction": 0.0},
        "checkpoint_every": 20,
        "validate_every": 0,
    },
}


def test_the_batch_grows_the_rate_follows_and_the_run_has_as_many_examples(train: Train):
    _, recorder, _ = train(**FOLLOWING)
    steps, changes = recorder.of("step"), recorder.of("batch_size")
    assert changes
    assert steps[-1]["samples_seen"] == 120 * 8
    assert len(steps) < 120
    sizes = [event["global_batch"] for event in steps]
    assert [event["samples_seen"] for event in steps] == [sum(sizes[: k + 1]) for k in range(len(sizes))]
    first = changes[0]
    assert (first["before"], first["batch"], first["rate_factor"]) == (8, 16, 2.0)
    assert sizes[first["step"] - 1 : first["step"] + 1] == [8, 16]
    # The rate of every step: the schedule at the examples seen before it, times the rule's factor of its batch.
    batch, seen = 8, 0
    for event in steps:
        batch = max(batch, event["global_batch"])
        assert event["learning_rate"] == pytest.approx(0.05 * (1 - seen / 960) ** 2 * batch / 8)
        seen = event["samples_seen"]


def test_a_run_that_is_stopped_after_its_batch_grew_continues_bit_for_bit(train: Train):
    outcome, undisturbed, folder = train("undisturbed", **FOLLOWING)
    at = undisturbed.of("batch_size")[0]["step"] + 7
    train("stopped", **FOLLOWING, stop_after=at)
    resumed, after, resumed_folder = train("stopped", **FOLLOWING)
    assert after.losses == undisturbed.losses[at:]
    assert differences(final_state(resumed_folder), final_state(folder)) == []
    assert resumed == outcome


def test_a_batch_that_cannot_change_has_the_losses_of_a_fixed_one(train: Train):
    still = {**FOLLOWING["train"], "batch_size": {"min": 8, "max": 8}}
    _, followed, _ = train("followed", **{**FOLLOWING, "train": still})
    _, fixed, _ = train("fixed", **{**FOLLOWING, "train": {**still, "batch_size": 8}})
    _, accumulated, _ = train(
        "accumulated", **{**FOLLOWING, "train": {**still, "batch_size": None, "accumulation": 2}}
    )
    assert followed.losses == fixed.losses == accumulated.losses


def test_ranks_decide_alike_and_keep_to_the_plan_of_their_largest_step(write_job: Any, tmp_path: Path):
    from orchestrator.planning import plan_job

    sizes = {"min": 16, "max": 64, "share": 1.0}
    train = {**FOLLOWING["train"], "workers": 2, "batch_size": sizes}
    job = JobSpec.load(write_job(**{**FOLLOWING, "train": train}, budget="100%"))
    plan = plan_job(job)
    run = Run(job, tmp_path / "run", plan=plan.to_json())
    steps = [event for event in run.events if event["event"] == "step"]
    assert steps[-1]["samples_seen"] == 120 * 16
    assert max(event["global_batch"] for event in steps) > 16
    # The first step of so small a model still holds what gloo has not freed.
    assert max(event["measured_peak_bytes"] for event in steps[1:]) <= plan.predicted_peak_bytes


def test_a_run_goes_on_with_other_workers_and_the_same_batch(write_job: Any, tmp_path: Path):
    job = JobSpec.load(
        write_job(model=PLAIN, optimizer={"name": "sgd", "lr": 0.05}, train={"workers": 2, "steps": 14})
    )
    whole = Run(job, tmp_path / "whole")
    before = Run(job, tmp_path / "run", at_step=stop_at(3))
    alone = job.with_changes({"workers": 1, "accumulation": 2})
    after = Run(alone, tmp_path / "run")
    seen = [event["samples_seen"] for event in (*before.events, *after.events) if event["event"] == "step"]
    assert seen == [8 * step for step in range(1, 15)]
    # The same samples in another order of additions.
    assert before.losses + after.losses == pytest.approx(whole.losses, rel=1e-5)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_keeps_the_global_batch_of_a_run_that_goes_on(write_job: Any, tmp_path: Path):
    path = write_job(model=PLAIN, train={"workers": 2, "steps": 6, "run_dir": "runs"})
    assert invoke("train", str(path), "--quiet", "--steps", "6").exit_code == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if checkpoint.name == "step-00000006":
            checkpoint.rename(tmp_path / "last")
    found = invoke("train", str(path), "--resume", str(run_dir), "--workers", "1", "--json")
    assert found.exit_code == 0, found.output
    objects = [json.loads(line) for line in found.stdout.splitlines()]
    assert [part["global_batch"] for part in objects if part["event"] == "step"] == [8, 8, 8]
    record = json.loads((run_dir / "run.json").read_text())
    assert record["running"]["train"]["accumulation"] == 2
    assert record["configuration"]["train"]["accumulation"] == 1
    refused = invoke("train", str(path), "--resume", str(run_dir), "--workers", "3")
    assert refused.exit_code == 2
    assert "has batches of 8, which 3 workers cannot share in micro-batches of 4" in refused.output


def test_auto_probes_sizes_and_begins_where_the_noise_is_known(write_job: Any, tmp_path: Path):
    path = write_job(
        model=PLAIN,
        optimizer={"name": "sgd", "lr": 0.05},
        train={"steps": 30, "batch_size": "auto", "run_dir": "runs"},
    )
    found = invoke("train", str(path))
    assert found.exit_code == 0, found.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    sizes = json.loads((run_dir / "run.json").read_text())["running"]["train"]["batch_size"]
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert sizes["rate_batch"] == 4
    assert 8 <= sizes["min"] <= sizes["start"] <= sizes["max"]
    assert steps[0]["global_batch"] == sizes["start"]
    assert 30 * 4 <= steps[-1]["samples_seen"] < 30 * 4 + steps[-1]["global_batch"]
    assert "probe: noise scale" in found.output
    assert "sized:" in found.output


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": "Auto"}, "batch_size must be auto, a whole number"),
        ({"batch_size": True}, "batch_size must be auto, a whole number"),
        ({"batch_size": 0}, "batch_size must be auto, a whole number"),
        ({"batch_size": 6}, "must be a multiple of 4 (1 workers with micro-batches of 4), got 6; write 4"),
        ({"batch_size": 8, "accumulation": 2}, "leave accumulation out"),
        ({"batch_size": {"min": 16, "max": 8}}, "min must not be above max"),
        ({"batch_size": {"min": 4, "max": 8}}, "one gradient a step says nothing of the noise"),
        ({"batch_size": {"min": 8, "max": 32, "start": 64}}, "start must lie between"),
        ({"batch_size": {"min": 8, "max": 32, "share": 0}}, "share"),
        ({"batch_size": {"min": 8, "max": 32, "role": "linear"}}, "did you mean 'rule'?"),
        ({"batch_size": "auto", "average": {}}, "average counts steps"),
    ],
)
def test_a_batch_size_that_cannot_be_is_refused_in_a_sentence(
    write_job: Any, settings: dict[str, Any], expected: str
):
    with pytest.raises(WorkloadError) as caught:
        JobSpec.load(write_job(train=settings))
    assert expected in str(caught.value)
