"""Runs whose number of workers changes while their global batch stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends import local, ray_cluster
from orchestrator.backends.attempt import Attempts
from orchestrator.data import BatchLayout
from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.run_folder import RunFolder
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment
from planner.inputs.strict import WorkloadError

PLAIN = {"target": "tiny.py:net", "kwargs": {"dropout": 0.0}}
RANGE: dict[str, Any] = {"backend": "ray", "workers": {"min": 1, "max": 4}, "steps": 6, "checkpoint_every": 3}


@pytest.mark.parametrize("count", [3, 4, 5, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_micro_batch_is_read_by_one_rank(count: int, world_size: int):
    layout = BatchLayout.of(count * 2, micro_batch=2, world_size=world_size)
    starts = [
        layout.start(100, micro=micro, rank=rank)
        for rank in range(world_size)
        for micro in range(layout.num_micro_batches(rank))
    ]
    assert sorted(starts) == [100 + 2 * number for number in range(count)]
    assert layout.global_batch == 2 * count
    assert layout.mean_micro_batches * world_size == pytest.approx(count)


def test_a_range_of_workers_begins_with_the_most_and_keeps_their_batch(write_job: Any):
    job = JobSpec.load(write_job(train={**RANGE, "accumulation": 2}))
    assert (job.train.workers, job.train.fewest_workers, job.global_batch) == (4, 1, 32)
    again = JobSpec.from_data(job.to_data(), folder=job.model.folder, source="again")
    assert again == job
    three = job.resized(3)
    assert (three.train.workers, three.global_batch, three.accumulation) == (3, 32, 3)
    assert job.with_changes({"workers": 2}).train.elastic is None


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ({"workers": {"min": 3, "max": 2}}, "min must be at most max, got 3 and 2"),
        ({"workers": {"min": 0, "max": 2}}, "greater than or equal to 1"),
        ({"workers": {"max": 2}}, "min"),
        ({"workers": {"min": 1, "max": 2}, "backend": "local"}, "come and go with a Ray cluster"),
        ({"workers": {"min": 1, "max": 2}, "sharding": "fsdp"}, "workers may be 1"),
        ({"workers": {"min": 2, "max": 3}, "sharding": "fsdp"}, "cannot be shared by 2"),
        ({"workers": {"min": 1, "max": 4}, "batch_size": 12}, "must be at least 16"),
        ({"workers": {"min": 1, "max": 4}, "batch_size": 18}, "multiple of 4"),
    ],
)
def test_a_wrong_range_of_workers_is_refused(train: dict[str, Any], complaint: str, write_job: Any):
    with pytest.raises(WorkloadError, match=complaint):
        JobSpec.load(write_job(train={"backend": "ray", **train}))


def run(job: JobSpec, folder: Path, *, steps: int | None = None) -> list[Event]:
    """The events of a run on this machine's processes, which stops after some steps if asked to."""
    folder.mkdir(exist_ok=True)
    events: list[Event] = []
    stop = StopSignal(lambda: None)

    def take(event: Event) -> None:
        events.append(event)
        stop.requested = stop.requested or (event["event"] == "step" and event["step"] == steps)

    assignment = Assignment(job.to_data(), str(job.model.folder), str(folder), plan=None)
    local.run(assignment, job, on_event=take, stop=stop, replan=NoPlan(assignment))
    return [event for event in events if event["event"] == "step"]


class NoPlan:
    """Assigns to other workers without planning."""

    is_planned = False

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def with_lower_budget(self) -> Assignment:
        raise AssertionError("there is no budget")

    def for_workers(self, workers: int) -> Assignment:
        job = JobSpec.from_data(self._assignment.job, folder=Path(self._assignment.folder), source="job")
        return Assignment(job.resized(workers).to_data(), ".", self._assignment.run_dir, plan=None)


@pytest.mark.slow
def test_ranks_that_share_a_batch_unevenly_have_the_losses_and_the_noise_of_one(
    write_job: Any, tmp_path: Path
):
    job = JobSpec.load(write_job(train={**RANGE, "clip_norm": 1.0}, model=PLAIN))
    runs = [run(job.resized(workers), tmp_path / str(workers)) for workers in (1, 3)]
    for alone, shared in zip(*runs, strict=True):
        for key in ("loss", "gradient_norm", "noise_scale", "global_batch", "samples_seen"):
            if alone[key] is not None or shared[key] is not None:
                assert shared[key] == pytest.approx(alone[key], rel=1e-4), key


@pytest.mark.slow
def test_a_run_goes_on_with_more_and_fewer_workers_and_the_same_loss(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={**RANGE, "steps": 9}, model=PLAIN))
    fixed = run(job.resized(2), tmp_path / "fixed")
    parts: list[Event] = []
    for workers, until in ((2, 3), (1, 6), (3, 9)):
        parts += run(job.resized(workers), tmp_path / "parts", steps=until)
    assert [event["step"] for event in parts] == list(range(1, 10))
    assert [event["loss"] for event in parts] == pytest.approx([event["loss"] for event in fixed], rel=1e-4)
    assert {event["global_batch"] for event in parts} == {16}


def test_a_resize_is_told_and_stays_in_its_folder(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train=RANGE))
    events: list[Event] = []
    assignment = Assignment(job.to_data(), "/there", str(tmp_path), plan=None, must_continue=True)
    attempts = Attempts(assignment, job, events.append, StopSignal(lambda: None), NoPlan(assignment))
    attempts.take({"event": "step", "step": 7})
    attempts.resize(3)
    assert attempts.assignment.job["train"]["workers"] == 3
    assert (attempts.assignment.folder, attempts.assignment.must_continue) == ("/there", True)
    assert events[-1] == {
        "event": "resized", "step": 7, "before": 4, "workers": 3, "accumulation": 2, "global_batch": 16
    }  # fmt: skip


def test_a_resized_run_is_continued_with_its_batch(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={**RANGE, "accumulation": 2}))
    folder = RunFolder.create(tmp_path / "runs", "tiny")
    folder.write_record(job, {}, status="stopped", running=job.resized(3))
    again = RunFolder.reopen(folder.path, job).continued(job)
    assert (again.train.workers, again.train.elastic, again.global_batch) == (3, job.train.elastic, 32)


def test_a_ray_that_cannot_resize_is_told(write_job: Any):
    def old(*, num_workers: int) -> None: ...
    def new(*, num_workers: Any, elastic_resize_monitor_interval_s: float) -> None: ...

    fixed, ranged = JobSpec.load(write_job()), JobSpec.load(write_job(train=RANGE))
    assert ray_cluster._number_of_workers("2.51.0", old, fixed) == {"num_workers": 1}
    assert ray_cluster._number_of_workers("2.60.0", new, ranged)["num_workers"] == (1, 4)
    with pytest.raises(RunFailedError, match=r"Ray 2\.51\.0 starts a fixed number of workers"):
        ray_cluster._number_of_workers("2.51.0", old, ranged)
