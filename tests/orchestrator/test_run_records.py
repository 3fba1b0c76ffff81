"""What a run leaves behind: metrics without repeated steps, a record that a later run checks, figures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import randomness
from orchestrator.job import JobSpec
from orchestrator.metrics import MetricsLog
from orchestrator.plots import loss_figure, running_mean
from orchestrator.progress import describe_step
from orchestrator.run_folder import RunFolder
from planner.inputs.strict import WorkloadError


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1 / number}


def test_a_restart_takes_back_the_steps_that_it_does_again(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    validation = {"event": "validation", "step": 0, "loss": 2.0}
    for event in ({"event": "started", "step": 0}, validation, step(1), step(2), step(3)):
        log.append(event)
    log.append({"event": "started", "step": 2})
    log.append(step(3))
    expected = [{"event": "started", "step": 0}, validation, step(1), step(2)]
    assert log.read() == [*expected, {"event": "started", "step": 2}, step(3)]


def test_a_start_from_nothing_takes_back_everything(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(step(1))
    log.append({"event": "started", "step": 0})
    assert log.read() == [{"event": "started", "step": 0}]


def test_what_the_leading_process_has_decided_stays(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    decided = [{"event": "failure", "step": 3}, {"event": "resized", "step": 3, "before": 2, "workers": 1}]
    for event in (step(2), step(3), *decided, {"event": "started", "step": 2}):
        log.append(event)
    assert log.read() == [step(2), *decided, {"event": "started", "step": 2}]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step(1)) + '\n{"event": "st')
    assert MetricsLog(path).read() == [step(1)]


def test_generators_continue_where_they_were_saved():
    randomness.seed_all(5)
    saved = randomness.capture_state(torch.device("cpu"))
    first = (random.random(), np.random.normal(), float(torch.rand(())))
    randomness.restore_state(saved, torch.device("cpu"))
    assert (random.random(), np.random.normal(), float(torch.rand(()))) == first


def test_ranks_draw_different_numbers():
    seeds = {randomness.rank_seed(0, rank=rank, step=at) for rank in range(8) for at in range(8)}
    assert len(seeds) == 64


def test_run_folders_of_the_same_second_do_not_meet(tmp_path: Path):
    folders = {RunFolder.create(tmp_path, "tiny").path for _ in range(3)}
    assert len(folders) == 3


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkloadError, match="cannot be made"):
        RunFolder.create(tmp_path / "file", "tiny")


def test_a_run_that_knew_no_second_optimizer_is_continued(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job())
    folder = RunFolder.create(tmp_path, job.name)
    folder.write_record(job, {}, running=job, status="stopped")
    record = json.loads(folder.record.read_text())
    del record["configuration"]["optimizer"]["then"]
    folder.record.write_text(json.dumps(record))
    RunFolder.reopen(folder.path, job)
    later = JobSpec.load(write_job(optimizer={"name": "ranger", "lr": 0.01, "then": {"name": "sgd"}}))
    with pytest.raises(WorkloadError, match="the job now differs in optimizer"):
        RunFolder.reopen(folder.path, later)


def test_a_changed_job_is_not_continued(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job())
    folder = RunFolder.create(tmp_path, job.name)
    folder.write_record(job, {}, running=job, status="stopped")
    RunFolder.reopen(folder.path, job)
    changed = JobSpec.load(write_job(optimizer={"name": "sgd", "lr": 0.1}, train={"seed": 3}))
    with pytest.raises(WorkloadError, match=r"the job now differs in optimizer, train\.seed"):
        RunFolder.reopen(folder.path, changed)
    with pytest.raises(WorkloadError, match=r"there is no run\.json"):
        RunFolder.reopen(tmp_path, job)


def test_a_plan_is_kept_only_by_the_job_that_it_was_made_for(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job())
    folder = RunFolder.create(tmp_path, job.name)
    assert not folder.was_planned_as(job)
    folder.write_record(job, {}, running=job, status="stopped")
    earlier = RunFolder.reopen(folder.path, job)
    assert earlier.was_planned_as(job.with_changes({"validate_every": 7}))
    for change in ({"budget": "37%"}, {"planning": "blocks"}, {"threads_per_worker": 2}):
        assert not earlier.was_planned_as(job.with_changes(change))
    with pytest.raises(WorkloadError, match=r"the job now differs in train\.batch_norm"):
        RunFolder.reopen(folder.path, job.with_changes({"batch_norm": "group_norm"}))


def test_the_record_names_versions_seed_and_machine(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job())
    folder = RunFolder.create(tmp_path, job.name)
    folder.write_record(job, {"budget": "none"}, running=job, status="running")
    record = json.loads(folder.record.read_text())
    assert record["configuration"] == job.to_data()
    # The distribution's version may lack the build's suffix ("+cu132") that the module's has.
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["seed"] == 0
    assert record["commit"] is None
    assert record["hardware"]["planned_for"] == "host"
    assert record["overrides"] == {"budget": "none"}


def test_the_running_mean_counts_the_first_values_fully():
    # (0.1 * 0.9 * 1 + 0.1 * 3) / (0.1 * 0.9 + 0.1) = 0.39 / 0.19
    assert running_mean([1.0, 3.0]) == pytest.approx([1.0, 0.39 / 0.19], rel=1e-12)


def test_the_loss_figure_shows_every_step_and_validation():
    events = [
        step(1),
        step(2),
        {"event": "validation", "step": 2, "loss": 0.7},
        {"event": "started", "step": 0},
    ]
    axes = loss_figure(events).axes[0]
    lines = [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]
    assert lines[0] == [(1, 1.0), (2, 0.5)]
    assert lines[2] == [(2, 0.7)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer steps", "loss")


def test_a_step_is_described_with_measured_beside_predicted():
    event = {
        **step(1),
        "samples_per_s": 12.4,
        "measured_peak_bytes": 3 << 20,
        "predicted_peak_bytes": 4 << 20,
        "noise_scale": 61.2,
        "noise_scale_interval": [40.0, None],
        "noise_scale_reliable": False,
    }
    text = "loss 1.0000  12 samples/s  peak 3.00 MiB (predicted 4.00 MiB)  noise scale 61 [40, inf]?"
    assert describe_step(event) == text


def test_a_continued_run_keeps_its_batch_and_how_it_was_divided(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={"workers": 4, "accumulation": 2}))
    ran = job.with_changes({"workers": 2, "accumulation": 4})
    folder = RunFolder.create(tmp_path / "runs", "tiny")
    folder.write_record(job, {}, running=ran, status="stopped")
    again = RunFolder.reopen(folder.path, job).continued(job)
    assert (again.train.workers, again.train.accumulation, again.global_batch) == (2, 4, 32)
    other = job.with_changes({"workers": 1})
    again = RunFolder.reopen(folder.path, other).continued(other)
    assert (again.train.workers, again.train.accumulation, again.global_batch) == (1, 8, 32)
    three = job.with_changes({"workers": 3})
    with pytest.raises(WorkloadError, match="which 3 workers cannot share in micro-batches of 4"):
        RunFolder.reopen(folder.path, three).continued(three)
