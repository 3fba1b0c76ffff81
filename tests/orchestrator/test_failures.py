"""What follows a failure: each cause leads to retry, replan or stop, is told, and is bounded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.backends.attempt import of_ranks
from orchestrator.checkpoint import CheckpointError
from orchestrator.checkpoint_writer import CheckpointWriteError
from orchestrator.failures import Cause, Failure, FailurePolicy, RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import MetricsLog
from orchestrator.nonfinite import all_finite
from orchestrator.rank_errors import NotFiniteError, RankError, cause_of
from orchestrator.training_progress import Progress
from planner.inputs.strict import WorkloadError
from tests.orchestrator.test_cli import COMMAND, lowtide
from tests.orchestrator.test_local_ranks import Run
from tests.orchestrator.test_training import Train, differences, final_state, train

__all__ = ["train"]

# Raises, waits or spoils a sample, at the third step, as often as there are files in `faults`.
FAULTY = """
import os, signal, torch
from pathlib import Path
import torch.distributed as dist
from tiny import data as good

class Faulty(torch.utils.data.Dataset):
    def __init__(self, samples, kind, rank, spoiled):
        self.samples, self.kind, self.rank, self.spoiled, self.read = samples, kind, rank, spoiled, 0
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, index):
        self.read += 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        inputs, target = self.samples[index]
        if index == self.spoiled:
            return inputs * float("nan"), target
        left = sorted(Path("faults").glob("*"))
        if self.read > 20 and rank == self.rank and left:
            left[0].unlink()
            if self.kind == "memory":
                raise MemoryError("no room")
            if self.kind == "error":
                raise KeyError("lost")
            if self.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.kind == "nan":
                return inputs * float("nan"), target
        return inputs, target

def data(kind="none", rank=0, spoiled=-1):
    train, validation = good()
    return Faulty(train, kind, rank, spoiled), validation
"""


@pytest.fixture
def faults(write_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The setting `data` of a job that has so many faults of a kind; `tiny.py` is beside it."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "faults").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny", raising=False)

    def setting(number: int, **kwargs: Any) -> dict[str, Any]:
        for index in range(number):
            (tmp_path / "faults" / str(index)).touch()
        return {"target": "faulty.py:data", "kwargs": kwargs}

    return setting


def failure(cause: Cause) -> Failure:
    return Failure(cause, "rank 1 failed", 1)


@pytest.mark.parametrize(
    ("cause", "is_planned", "num_steps", "expected"),
    [
        (Cause.KILLED, True, 0, "retry"),
        (Cause.HANG, True, 3, "retry"),
        (Cause.LOST_PEER, False, 3, "retry"),
        (Cause.OUT_OF_MEMORY, True, 0, "replan"),
        (Cause.OUT_OF_MEMORY, False, 3, "stop"),
        (Cause.NOT_FINITE, True, 3, "stop"),
        (Cause.BAD_INPUT, True, 3, "stop"),
        (Cause.STORAGE, True, 3, "stop"),
        (Cause.ERROR, True, 3, "retry"),
        (Cause.ERROR, True, 0, "stop"),
    ],
)
def test_each_cause_has_its_decision(cause: Cause, is_planned: bool, num_steps: int, expected: str):
    policy = FailurePolicy(max_failures=3, is_planned=is_planned)
    assert policy.decide(failure(cause), step=5, num_steps=num_steps).action == expected


def test_the_number_of_retries_is_bounded_and_the_same_error_at_the_same_step_stops():
    policy = FailurePolicy(max_failures=2, is_planned=True)
    answers = [policy.decide(failure(Cause.KILLED), step=step, num_steps=1) for step in (1, 2, 3)]
    assert [answer.action for answer in answers] == ["retry", "retry", "stop"]
    assert answers[-1].reason == "train.max_failures allows 2, and this is number 3"
    other = FailurePolicy(max_failures=9, is_planned=True)
    again = [other.decide(failure(Cause.ERROR), step=step, num_steps=1).action for step in (4, 5, 5)]
    assert again == ["retry", "retry", "stop"]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Cause.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Cause.OUT_OF_MEMORY),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), Cause.LOST_PEER),
        (RuntimeError("[gloo/x.cc:81] Timed out waiting 2000ms for recv operation"), Cause.HANG),
        (RuntimeError("Application timeout caused pair closure"), Cause.HANG),
        (RuntimeError("shapes differ; timeout of the model"), Cause.ERROR),
        (CheckpointWriteError("full"), Cause.STORAGE),
        (CheckpointError("other"), Cause.BAD_INPUT),
        (WorkloadError("wrong"), Cause.BAD_INPUT),
        (NotFiniteError("nan"), Cause.NOT_FINITE),
        (FloatingPointError("nan"), Cause.NOT_FINITE),
    ],
)
def test_errors_of_a_rank_are_told_apart(error: Exception, cause: Cause):
    assert cause_of(error) is cause


def test_the_rank_that_said_nothing_is_the_one_that_did_not_come():
    waiting = RankError("rank 0: Timed out", Cause.HANG, 0)
    peer = RankError("rank 2: closed", Cause.LOST_PEER, 2)
    found = of_ranks({0: waiting, 2: peer}, {}, world_size=3, timeout="2s")
    assert (found.cause, found.rank) == (Cause.HANG, 1)
    assert found.message.startswith("rank 1 did not come to a collective operation within 2s")
    # A rank with an error of its own is the cause of what its peers say.
    memory = RankError("rank 1: out of memory", Cause.OUT_OF_MEMORY, 1)
    assert of_ranks({0: peer, 1: memory}, {}, world_size=2, timeout="2s").rank == 1
    assert (
        of_ranks({0: waiting}, {1: "was ended by SIGKILL"}, world_size=2, timeout="2s").cause is Cause.KILLED
    )


def test_weights_with_a_nan_or_an_infinity_are_found():
    good = [torch.ones(3), torch.zeros(0), torch.tensor([1j]), torch.tensor([3.0e38, -3.0e38])]
    assert all_finite(good)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([*good, torch.tensor([1.0, bad, 2.0])])


def test_samples_that_are_left_out_are_stepped_over_once():
    # 0..3, then 4 and 5 are left out, 6..9, then 10 and 11.
    skipped = [(4, 2), (10, 2)]
    assert [Progress(samples_seen=seen, skipped=skipped).position for seen in (0, 2, 4, 6, 8)] == [
        0,
        2,
        6,
        8,
        12,
    ]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(train: Train, faults: Any):
    _, undisturbed, folder = train("undisturbed", train={"data": faults(0)})
    with pytest.raises(
        RankError, match=r"step 6 is not finite \(rank 0\).* train.on_nan to 'rollback'"
    ) as caught:
        train("stopped", train={"data": faults(1, kind="nan")})
    assert caught.value.cause is Cause.NOT_FINITE
    _, after, resumed = train("stopped", train={"data": faults(0, kind="nan")})
    assert after.losses == undisturbed.losses[3:]
    assert differences(final_state(resumed), final_state(folder)) == []


def test_a_rollback_costs_no_bit_where_the_fault_does_not_come_again(train: Train, faults: Any):
    _, undisturbed, folder = train("undisturbed", train={"data": faults(0)})
    settings = {"data": faults(1, kind="nan"), "on_nan": "rollback"}
    outcome, recorder, back = train("back", train=settings)
    (told,) = recorder.of("failure")
    assert told["decision"] == "rollback"
    assert "back to step 3 and on with the same samples, 1 of at most 3 times" in told["message"]
    assert [event["step"] for event in recorder.of("started")] == [0, 3]
    assert recorder.losses == undisturbed.losses[:5] + undisturbed.losses[3:]
    assert outcome.finished
    assert differences(final_state(back)["model"], final_state(folder)["model"]) == []
    assert differences(final_state(back)["optimizer"], final_state(folder)["optimizer"]) == []


def test_samples_that_are_not_finite_again_are_left_out_before_the_first_checkpoint_too(
    train: Train, faults: Any
):
    # Of 50 samples in batches of 4 every order has sample 0 once in its 12 or 13 steps.
    settings = {"data": faults(0, spoiled=0), "on_nan": "rollback", "steps": 12, "checkpoint_every": 0}
    outcome, recorder, folder = train(train=settings)
    first, second = recorder.of("failure")
    assert "with the same samples" in first["message"]
    assert (
        f"without samples {4 * (first['step'] - 1)} to {4 * first['step'] - 1} of the stream"
        in second["message"]
    )
    assert outcome.finished
    assert final_state(folder)["progress"]["skipped"] == [(4 * (first["step"] - 1), 4)]
    assert final_state(folder)["progress"]["samples_seen"] == 48


def test_rollbacks_are_bounded(train: Train, faults: Any):
    with pytest.raises(RankError, match=r"after 2 rollbacks, and train\.max_failures allows 2"):
        train(train={"data": faults(40, kind="nan"), "on_nan": "rollback", "max_failures": 2})


def test_continue_only_warns(train: Train, faults: Any):
    outcome, recorder, _ = train(train={"data": faults(1, kind="nan"), "on_nan": "continue"})
    assert outcome.step == 9
    assert recorder.losses[5:] == [None] * 4
    assert "the loss of step 6 is not finite" in recorder.of("warning")[0]["message"]


def test_checkpoints_that_are_all_gone_are_said_and_nothing_begins_anew(write_job: Any, tmp_path: Path):
    path = write_job()
    assert lowtide("train", path).exit_code == 0
    (run,) = (tmp_path / "runs").iterdir()
    shutil.rmtree(run / "checkpoints")
    result = lowtide("train", path, "--resume", run)
    assert result.exit_code == 2
    assert "no valid checkpoint is left in" in result.stderr
    assert "start a new run without --resume" in result.stderr


def test_too_little_memory_is_answered_by_a_plan_with_nine_tenths_of_the_budget(
    write_job: Any, tmp_path: Path, faults: Any
):
    train = {"data": faults(1, kind="memory")}
    result = lowtide("train", write_job(budget="1MiB", train=train))
    assert result.exit_code == 0, result.output
    assert "rank 0: out of memory (predicted peak" in result.stderr
    assert "planning with a lower budget and trying again, 1 of at most 3 times" in result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["running"]["budget"] == "943718B"  # 0.9 * 2**20
    events = MetricsLog(run / "metrics.jsonl").read()
    assert [e["decision"] for e in events if e["event"] == "failure"] == ["replan"]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 10))
    assert (
        lowtide("train", write_job(train={"data": faults(1, kind="memory")})).exit_code == 1
    )  # no plan to lower


def test_an_error_that_comes_once_is_tried_again_in_the_same_process(
    write_job: Any, tmp_path: Path, faults: Any
):
    job = JobSpec.load(write_job(train={"data": faults(0, kind="error")}))
    undisturbed = Run(job, tmp_path / "undisturbed")
    faults(1)
    disturbed = Run(job, tmp_path / "disturbed")
    told = [event["message"] for event in disturbed.events if event["event"] == "failure"]
    assert len(told) == 1
    assert "KeyError: 'lost'" in told[0]
    assert disturbed.outcome == undisturbed.outcome


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_run_goes_on_bit_for_bit(
    write_job: Any, tmp_path: Path, faults: Any
):
    train = {"workers": 2, "collective_timeout": "1s"}
    job = JobSpec.load(write_job(train={**train, "data": faults(0, kind="stop", rank=1)}))
    undisturbed = Run(job, tmp_path / "undisturbed")
    faults(1)
    disturbed = Run(job, tmp_path / "disturbed")
    (told,) = [event for event in disturbed.events if event["event"] == "failure"]
    assert (told["cause"], told["rank"], told["decision"]) == ("hang", 1, "retry")
    assert "rank 1 did not come to a collective operation within 1s, where rank 0 waited" in told["message"]
    assert disturbed.outcome == undisturbed.outcome
    faults(9)
    with pytest.raises(RunFailedError, match=r"train\.max_failures allows 0"):
        Run(job.with_changes({"max_failures": 0}), tmp_path / "refused")


@pytest.mark.slow
def test_a_signal_to_the_whole_group_loses_no_step_and_has_a_status_of_its_own(
    write_job: Any, tmp_path: Path
):
    path = write_job(train={"workers": 2, "steps": 300, "checkpoint_every": 0})
    command = [*COMMAND, "train", str(path), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    os.killpg(process.pid, signal.SIGTERM)
    rest, complaint = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"Continue with: lowtide train {path} --resume" in complaint
    told = [json.loads(line) for line in [first, *rest.splitlines()]]
    again = subprocess.run(
        [*command, "--resume", told[-1]["run_dir"]], capture_output=True, text=True, check=True
    )
    steps = [
        event["step"]
        for event in told + [json.loads(line) for line in again.stdout.splitlines()]
        if event["event"] == "step"
    ]
    assert steps == list(range(1, 301))


@pytest.mark.slow
def test_ranks_end_with_their_driver_and_the_run_says_so_when_it_goes_on(write_job: Any, tmp_path: Path):
    path = write_job(train={"workers": 2, "steps": 300, "checkpoint_every": 50})
    process = subprocess.Popen([*COMMAND, "train", str(path), "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["step"] < 60:
        pass
    process.kill()
    process.stdout.read()  # ends when the last rank, which has inherited the pipe, has ended
    process.wait()
    (run,) = (tmp_path / "runs").iterdir()
    result = lowtide("train", path, "--resume", run)
    assert result.exit_code == 0, result.output
    events = MetricsLog(run / "metrics.jsonl").read()
    (told,) = [event for event in events if event["event"] == "failure"]
    assert (told["cause"], told["decision"]) == ("lost_driver", "retry")
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 301))
