"""Training in one process: the same numbers with and without a plan, and after a stop."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import planner
from orchestrator.checkpoint import CheckpointStore, load_state
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.planning import plan_job
from orchestrator.rank_errors import RankError
from orchestrator.worker import Assignment, Outcome, train_rank
from planner.inputs.strict import WorkloadError


class Recorder:
    """Keeps what a rank reports, and asks it to stop after a step."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self._stop_after = stop_after

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def stop_requested(self) -> bool:
        return self._stop_after is not None and len(self.of("step")) + 1 >= self._stop_after

    def checkpoint_saved(self, place: Path | None, *, step: int) -> None:
        assert place is not None
        assert place.is_dir()

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step")]


Train = Callable[..., tuple[Outcome, Recorder, Path]]


@pytest.fixture
def train(write_job: Any, tmp_path: Path) -> Train:
    """Train the tiny job as the only rank, in this process."""

    def run(
        run_dir: str = "run",
        *,
        stop_after: int | None = None,
        train: dict[str, Any] | None = None,
        plan: bool = False,
        **changes: Any,
    ) -> tuple[Outcome, Recorder, Path]:
        job = JobSpec.load(write_job(train=train, **changes))
        folder = tmp_path / run_dir
        folder.mkdir(exist_ok=True)
        assignment = Assignment(
            job=job.to_data(),
            folder=str(tmp_path),
            run_dir=str(folder),
            plan=plan_job(job).to_json() if plan else None,
        )
        recorder = Recorder(stop_after=stop_after)
        outcome = train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=recorder)
        return outcome, recorder, folder

    return run


def final_state(folder: Path) -> dict[str, Any]:
    newest = CheckpointStore(folder / "checkpoints", keep=9).newest_valid()
    assert newest is not None
    return load_state(newest)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two states differ in any bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        return [found for key in one for found in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), place
        return [
            found
            for index, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{place}.{index}")
        ]
    return [] if one == other else [place]


def test_a_planned_run_has_the_losses_of_a_plain_one_bit_for_bit(train: Train):
    batch = {"inputs": {"shape": [256, 8]}, "targets": {"shape": [256], "dtype": "int64", "high": 4}}
    deep = {"model": "tiny.py:deep", "batch": batch}
    _, plain, plain_folder = train("plain", **deep)
    _, planned, planned_folder = train("planned", **deep, plan=True, budget="75%")
    peaks = [run.of("step")[-1]["measured_peak_bytes"] for run in (planned, plain)]
    assert peaks[0] < peaks[1]
    assert planned.losses == plain.losses
    assert differences(final_state(planned_folder), final_state(plain_folder)) == []


@pytest.mark.parametrize("optimizer", ["ranger", "ranger_lars", "lamb", "adamw"])
def test_a_stopped_run_continues_bit_for_bit(train: Train, optimizer: str):
    hyper = {"name": optimizer, "lr": 0.01}
    outcome, undisturbed, folder = train("undisturbed", optimizer=hyper)
    stopped, before, _ = train("stopped", optimizer=hyper, stop_after=4)
    resumed, after, resumed_folder = train("stopped", optimizer=hyper)
    assert (stopped.finished, stopped.step, resumed.finished, resumed.step) == (False, 4, True, 9)
    assert after.of("started") == [{"event": "started", "step": 4}]
    assert before.losses + after.losses == undisturbed.losses
    assert differences(final_state(resumed_folder), final_state(folder)) == []
    assert resumed == outcome


def test_the_noise_scale_of_a_stopped_run_continues_bit_for_bit(train: Train):
    settings = {"train": {"accumulation": 4, "steps": 60}}
    _, undisturbed, _ = train("undisturbed", **settings)
    train("stopped", **settings, stop_after=37)
    _, after, _ = train("stopped", **settings)
    noise = [
        [
            {key: value for key, value in event.items() if key.startswith("noise_scale")}
            for event in recorder.of("step")[-23:]
        ]
        for recorder in (after, undisturbed)
    ]
    assert noise[0] == noise[1]
    assert noise[0][-1]["noise_scale_interval"][0] > 0
    assert len(noise[0][-1]["noise_scale_by_group"]) == 2


def test_batch_norm_has_no_noise_scale_and_the_run_says_why(train: Train):
    outcome, recorder, _ = train(
        model="tiny.py:normalized",
        train={"accumulation": 4, "steps": 30},
        optimizer={"name": "sgd", "lr": 0.1},
    )
    last = recorder.of("step")[-1]
    assert last["noise_scale"] is None
    assert last["noise_scale_reason"].startswith("batch norm (model.1) couples the examples")
    assert outcome.recommended_batch is None
    assert "measure with frozen statistics (.eval() of these layers)" in outcome.recommended_because


def test_averaged_weights_resume_are_evaluated_and_saved_and_the_run_is_not_changed(train: Train):
    average = {"kind": "swa", "start": 0.75}
    _, plain, plain_folder = train("plain")
    _, undisturbed, folder = train("undisturbed", train={"average": average})
    train("stopped", train={"average": average}, stop_after=8)  # of 9 steps, 7 and on are averaged
    _, after, resumed_folder = train("stopped", train={"average": average})
    assert undisturbed.losses == plain.losses
    assert differences(final_state(resumed_folder), final_state(folder)) == []
    assert differences(final_state(folder)["model"], final_state(plain_folder)["model"]) == []
    averages = [torch.load(f / "averaged.pt", weights_only=True) for f in (folder, resumed_folder)]
    assert differences(*averages) == []
    assert differences(averages[0], final_state(folder)["model"]) != []
    assert after.of("average")[0]["loss"] == undisturbed.of("average")[0]["loss"]


def test_an_average_that_starts_too_early_is_refused(train: Train):
    with pytest.raises(WorkloadError, match=r"average.*start"):
        train(train={"average": {"start": 0.5}})


def test_a_damaged_checkpoint_only_costs_the_steps_since_the_one_before(train: Train):
    _, undisturbed, _ = train("undisturbed")
    _, _, folder = train("damaged")
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    (newest / "state.pt").write_bytes(b"not a checkpoint")
    outcome, resumed, _ = train("damaged")
    assert outcome.finished
    assert resumed.of("started") == [{"event": "started", "step": 6}]
    assert resumed.losses == undisturbed.losses[6:]
    assert "does not match its checksum" in resumed.of("warning")[0]["message"]


def test_a_finished_run_has_nothing_left_to_do(train: Train):
    train()
    outcome, again, _ = train()
    assert outcome.finished
    assert again.losses == []


def test_runs_are_the_same_for_a_seed_and_differ_between_seeds(train: Train):
    losses = [train(name, train={"seed": seed})[1].losses for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_accumulated_micro_batches_are_one_batch(train: Train):
    plain = {"target": "tiny.py:net", "kwargs": {"dropout": 0.0}}
    whole = {"inputs": {"shape": [8, 8]}, "targets": {"shape": [8], "dtype": "int64", "high": 4}}
    _, accumulated, _ = train("accumulated", model=plain, train={"accumulation": 2})
    _, at_once, _ = train("at once", model=plain, batch=whole)
    # The same samples, but sums of four and four round differently than a sum of eight.
    assert accumulated.losses == pytest.approx(at_once.losses, rel=1e-5)
    assert accumulated.of("step")[-1]["samples_seen"] == at_once.of("step")[-1]["samples_seen"] == 72


def test_validations_and_checkpoints_come_when_asked_for(train: Train):
    outcome, recorder, _ = train(train={"validate_every": 4, "checkpoint_every": 3})
    assert [event["step"] for event in recorder.of("validation")] == [0, 4, 8, 9]
    assert [event["step"] for event in recorder.of("checkpoint")] == [3, 6, 9]
    validations = recorder.of("validation")
    assert outcome.validation_before == validations[0]["loss"]
    assert (outcome.validation_after, outcome.validated_step) == (validations[-1]["loss"], 9)


def test_the_checkpoint_of_the_least_validation_loss_stays_beside_the_newest(train: Train):
    settings = {"steps": 8, "validate_every": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "keep_best": 1}
    # With such a rate every step makes it worse.
    _, recorder, folder = train(train=settings, optimizer={"name": "sgd", "lr": 30.0})
    losses = {event["step"]: event["loss"] for event in recorder.of("validation") if event["step"]}
    assert min(losses, key=losses.__getitem__) == 2
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000008"]


def test_a_checkpoint_that_finds_the_disk_full_costs_no_bit_of_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    _, free, _ = train("free", train={"checkpoint_every": 3})
    save = CheckpointStore.save

    def full_at_step_3(store: CheckpointStore, state: Any, *, step: int, validation_loss: Any) -> Path:
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(store, state, step=step, validation_loss=validation_loss)

    monkeypatch.setattr(CheckpointStore, "save", full_at_step_3)
    # The recorder knows a checkpoint by its folder, and step 3 has none.
    monkeypatch.setattr(Recorder, "checkpoint_saved", lambda *_, **__: None)
    _, full, folder = train("full", train={"checkpoint_every": 3})
    assert [event["step"] for event in full.of("checkpoint")] == [6, 9]
    (warning,) = full.of("warning")
    assert "the checkpoint of step 3 could not be written (No space left on device)" in warning["message"]
    assert full.losses == free.losses
    assert differences(final_state(folder), final_state(folder.parent / "free")) == []


def test_the_gradient_norm_is_reported_where_it_is_clipped(train: Train):
    _, free, _ = train("free")
    _, clipped, _ = train("clipped", train={"clip_norm": 1e-3})
    assert free.of("step")[0]["gradient_norm"] is None
    assert clipped.of("step")[0]["gradient_norm"] > 1e-3
    assert clipped.losses[0] == free.losses[0]
    assert clipped.losses != free.losses


def test_peaks_are_measured_as_often_as_asked_for(train: Train):
    _, each, _ = train("each")
    _, third, _ = train("third", train={"measure_memory_every": 3})
    _, never, _ = train("never", train={"measure_memory_every": 0})
    assert all(
        event["measured_peak_bytes_by_rank"] == (event["measured_peak_bytes"],) for event in each.of("step")
    )
    measured = [event["measured_peak_bytes"] for event in third.of("step")]
    assert [peak is not None for peak in measured] == [True, False, False] * 3
    assert all(event["measured_peak_bytes"] is None for event in never.of("step"))
    assert each.losses == third.losses == never.losses


def test_the_measured_peak_counts_what_a_rank_holds(train: Train):
    # Parameters of the net 8-16-4: 8*16 + 16 + 16*4 + 4 = 212 floats. SGD without momentum holds nothing more; at
    # the end of backward there are as many gradients: at least 2 * 848 B, plus a few activations.
    _, recorder, _ = train(optimizer={"name": "sgd", "lr": 0.1})
    assert 2 * 848 <= recorder.of("step")[-1]["measured_peak_bytes"] <= 2 * 848 + 4096


def test_one_rank_without_accumulation_has_no_noise_scale_and_says_why(train: Train):
    outcome, recorder, _ = train()
    assert recorder.of("step")[-1]["noise_scale"] is None
    assert "only one gradient" in recorder.of("step")[-1]["noise_scale_reason"]
    assert outcome.recommended_batch is None
    assert "accumulate at least two micro-batches" in outcome.recommended_because


def test_an_accumulating_rank_measures_the_noise_scale(train: Train):
    _, recorder, _ = train(train={"accumulation": 4, "steps": 40})
    last = recorder.of("step")[-1]
    assert "only one gradient" not in last["noise_scale_reason"]
    low, high = last["noise_scale_interval"]
    assert low >= 0
    assert high is None or low < high


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch": {"inputs": {"shape": [4, 9]}}}, "but the batch says [4, 9]"),
        ({"optimizer": {"name": "rangers"}}, "unknown optimizer 'rangers'"),
        ({"optimizer": {"name": "ranger", "learning_rate": 1}}, "has no hyper-parameter 'learning_rate'"),
        ({"optimizer": {"name": "ranger", "lr": -1}}, "lr must be"),
        ({"train": {"schedule": {"name": "polynom"}}}, "unknown schedule 'polynom'"),
        ({"train": {"schedule": {"warmup": 0.1}}}, "unexpected keyword argument 'warmup'"),
        ({"train": {"data": "tiny.py:net"}}, "must return the pair"),
    ],
)
def test_what_the_user_wrote_wrong_is_said_in_a_sentence(
    train: Train, changes: dict[str, Any], expected: str
):
    batch = changes.get("batch")
    if batch is not None:
        batch["targets"] = {"shape": [4], "dtype": "int64", "high": 4}
    with pytest.raises(RankError) as caught:
        train(**changes)
    assert caught.value.bad_input
    assert expected in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_failure_of_the_model_leaves_its_traceback_in_the_run_folder(train: Train, tmp_path: Path):
    (tmp_path / "bad.py").write_text("def loss(output, target):\n    return output[99].sum()\n")
    with pytest.raises(RankError, match="rank 0: IndexError") as caught:
        train(loss="bad.py:loss")
    assert not caught.value.bad_input
    assert "return output[99].sum()" in (tmp_path / "run" / "error-rank-0.txt").read_text()


def test_a_plan_for_another_batch_is_refused(train: Train, write_job: Any, tmp_path: Path):
    other = {"inputs": {"shape": [6, 8]}, "targets": {"shape": [6], "dtype": "int64", "high": 4}}
    plan = plan_job(JobSpec.load(write_job(batch=other, budget="1MiB")))
    job = JobSpec.load(write_job(budget="1MiB"))
    assignment = Assignment(job.to_data(), str(tmp_path), str(tmp_path), plan.to_json())
    with pytest.raises(RankError) as caught:
        train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=Recorder())
    assert caught.value.bad_input
    assert isinstance(caught.value.__cause__, planner.PlanMismatchError)


def test_a_model_that_returns_its_own_loss_is_called_with_the_inputs_alone(train: Train, tmp_path: Path):
    source = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs):
        return (self.linear(inputs) - inputs).square().mean()

def data():
    inputs = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return (TensorDataset(inputs, inputs),) * 2
"""
    (tmp_path / "own.py").write_text(source)
    changes = {"model": "own.py:Own", "loss": None, "batch": {"inputs": {"shape": [4, 8]}}}
    changes["optimizer"] = {"name": "sgd", "lr": 0.5}
    _, plain, _ = train("plain", **changes, train={"data": "own.py:data"})
    _, planned, _ = train("planned", **changes, train={"data": "own.py:data"}, budget="1MiB", plan=True)
    assert plain.losses[-1] < plain.losses[0]
    assert planned.losses == plain.losses
