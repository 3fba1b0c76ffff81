"""Several ranks in processes of this machine: agreement, exactness, and what is said when one is lost."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.backends import local
from orchestrator.checkpoint import load_state
from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.planning import plan_job
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome
from tests.orchestrator.test_training import differences

pytestmark = pytest.mark.slow

DEEP = {
    "model": "tiny.py:deep",
    "batch": {"inputs": {"shape": [256, 8]}, "targets": {"shape": [256], "dtype": "int64", "high": 4}},
}


class Run:
    """One run of the local backend; `at_step` is called with each step's number while it goes on."""

    def __init__(self, job: JobSpec, run_dir: Path, *, plan: str | None = None, at_step: Any = None) -> None:
        run_dir.mkdir(exist_ok=True)
        self.events: list[Event] = []
        self.stop = StopSignal(lambda: None)
        self._at_step = at_step
        assignment = Assignment(job.to_data(), str(job.model.folder), str(run_dir), plan)
        self.outcome: Outcome = local.run(assignment, job, on_event=self._take, stop=self.stop)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if event["event"] == "step" and self._at_step is not None:
            self._at_step(self, event["step"])

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.events if event["event"] == "step"]


def stop_at(step: int) -> Any:
    def act(run: Run, at: int) -> None:
        if at == step:
            run.stop.requested = True

    return act


def test_two_planned_ranks_have_the_losses_of_two_plain_ones_bit_for_bit(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(**DEEP, train={"workers": 2}, budget="80%"))
    plan = plan_job(job)
    planned = Run(job, tmp_path / "planned", plan=plan.to_json())
    plain = Run(job, tmp_path / "plain")
    assert len(plain.losses) == 9
    assert planned.losses == plain.losses
    assert planned.outcome == plain.outcome
    for event in (event for event in planned.events if event["event"] == "step"):
        assert len(event["measured_peak_bytes_by_rank"]) == 2
        assert max(event["measured_peak_bytes_by_rank"]) <= plan.budget_bytes


def test_two_ranks_stop_together_and_continue_bit_for_bit(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={"workers": 2, "steps": 14}))
    undisturbed = Run(job, tmp_path / "undisturbed")
    stopped = Run(job, tmp_path / "stopped", at_step=stop_at(3))
    resumed = Run(job, tmp_path / "stopped")
    assert not stopped.outcome.finished
    assert stopped.outcome.step < 14
    assert resumed.outcome == undisturbed.outcome
    assert stopped.losses + resumed.losses == undisturbed.losses


def test_three_ranks_continue_bit_for_bit(write_job: Any, tmp_path: Path):
    # With three ranks the order of a sum over ranks shows in the last bit. DDP would change it after the first step
    # of a process where gradients come in another order than that of the parameters.
    job = JobSpec.load(
        write_job(model="tiny.py:Crossed", train={"workers": 3, "steps": 15, "checkpoint_every": 5})
    )
    folder = tmp_path / "run" / "checkpoints"
    undisturbed = Run(job, tmp_path / "run")
    weights = load_state(folder / "step-00000015")["model"]
    for step in (10, 15):
        shutil.rmtree(folder / f"step-{step:08d}")
    resumed = Run(job, tmp_path / "run")
    assert resumed.losses == undisturbed.losses[5:]
    assert resumed.outcome == undisturbed.outcome
    again = load_state(folder / "step-00000015")["model"]
    assert [name for name in weights if not torch.equal(again[name], weights[name])] == []


def test_two_accumulating_ranks_keep_to_the_plan(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(**DEEP, train={"workers": 2, "accumulation": 2}, budget="80%"))
    plan = plan_job(job)
    planned = Run(job, tmp_path / "planned", plan=plan.to_json())
    peaks = [event["measured_peak_bytes"] for event in planned.events if event["event"] == "step"]
    assert max(peaks) <= plan.budget_bytes
    # From the second step on, when the optimizer has its state.
    assert peaks[1:] == pytest.approx([plan.predicted_peak_bytes] * 8, rel=0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_step_after_a_resume_keeps_to_the_plan_too(write_job: Any, tmp_path: Path, workers: int):
    # Then the optimizer has its state already, while buckets, the order of the data and hooks are new.
    data = {"target": "tiny.py:data", "kwargs": {"samples": 20_000}}
    train = {"workers": workers, "accumulation": 4 // workers, "steps": 6, "data": data}
    job = JobSpec.load(write_job(**DEEP, train=train, budget="80%"))
    plan = plan_job(job)
    Run(job, tmp_path / "run", plan=plan.to_json(), at_step=stop_at(3))
    resumed = Run(job, tmp_path / "run", plan=plan.to_json())
    peaks = [event["measured_peak_bytes"] for event in resumed.events if event["event"] == "step"]
    assert len(peaks) == 2
    assert max(peaks) <= plan.predicted_peak_bytes + 512


def test_a_killed_rank_is_named_and_no_process_stays(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={"workers": 2, "steps": 10_000, "max_failures": 0}))

    def kill(run: Run, step: int) -> None:
        if step == 3:
            # Ranks are started in order, so the newest process is that of rank 1.
            newest = max(child.pid or 0 for child in multiprocessing.active_children())
            os.kill(newest, signal.SIGKILL)

    with pytest.raises(RunFailedError, match="rank 1 was ended by SIGKILL"):
        Run(job, tmp_path / "run", at_step=kill)
    assert multiprocessing.active_children() == []


def test_ranks_that_are_killed_after_the_change_of_their_optimizer_continue_bit_for_bit(
    write_job: Any, tmp_path: Path
):
    sgd = {"name": "sgd", "lr": 0.2, "momentum": 0.9, "start": 0.5}
    train = {"workers": 2, "steps": 10, "checkpoint_every": 5, "max_failures": 0}
    job = JobSpec.load(write_job(optimizer={"name": "adamw", "lr": 0.01, "then": sgd}, train=train))

    def kill(run: Run, step: int) -> None:
        if step == 7:  # the newest checkpoint is that of step 5, where the change is
            newest = max(child.pid or 0 for child in multiprocessing.active_children())
            os.kill(newest, signal.SIGKILL)

    undisturbed = Run(job, tmp_path / "undisturbed")
    with pytest.raises(RunFailedError, match="rank 1 was ended by SIGKILL"):
        Run(job, tmp_path / "killed", at_step=kill)
    # It may have come as far as step 10 before it was killed.
    for path in (tmp_path / "killed" / "checkpoints").iterdir():
        if path.name != "step-00000005":
            shutil.rmtree(path)
    resumed = Run(job, tmp_path / "killed")
    assert resumed.losses == undisturbed.losses[5:]
    weights, again = (
        load_state(tmp_path / name / "checkpoints" / "step-00000010") for name in ("undisturbed", "killed")
    )
    assert differences(weights["model"], again["model"]) == []
    assert differences(weights["optimizer"], again["optimizer"]) == []


def test_bad_input_is_said_once_though_every_rank_meets_it(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={"workers": 2}, optimizer={"name": "rangers"}))
    with pytest.raises(RunFailedError, match="unknown optimizer 'rangers'") as caught:
        Run(job, tmp_path / "run")
    assert caught.value.bad_input
    assert str(caught.value).count("unknown optimizer") == 1
    assert multiprocessing.active_children() == []


def test_ctrl_c_while_ranks_run_leaves_none_behind(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(train={"workers": 2, "steps": 10_000}))

    def interrupt_twice(run: Run, step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Run(job, tmp_path / "run", at_step=interrupt_twice)
    assert multiprocessing.active_children() == []
