"""Checkpoints at an address: whole or absent, verified, kept by policy; what cannot be used is a sentence."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from orchestrator.checkpoint import CheckpointStore, load_state, step_of
from orchestrator.checkpoint_places import Address, check_place, place_of
from orchestrator.job import JobSpec
from orchestrator.worker import Assignment, train_rank
from planner.inputs.strict import WorkloadError
from tests.orchestrator.test_training import Recorder, differences

COMMAND = [sys.executable, "-m", "orchestrator.cli", "train"]


def state(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((3,), value)}, "progress": {"step": 1, "loss": None}}


@pytest.fixture
def store() -> CheckpointStore[Address]:
    """One in the memory of this process."""
    return CheckpointStore(Address(f"memory://{uuid.uuid4().hex}"), keep=2, keep_best=1)


def steps_in(store: CheckpointStore[Any]) -> list[int]:
    return [step_of(path) for path in store.paths()]


def memory(path: Address) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(str(path))


def test_what_was_saved_at_an_address_is_read_back(store: CheckpointStore[Address]):
    place = store.save(state(2.5), step=7)
    assert str(place) == f"{store.folder}/step-00000007"
    assert load_state(place)["model"]["weight"].tolist() == [2.5, 2.5, 2.5]
    assert load_state(place)["progress"] == {"step": 1, "loss": None}
    store.save(state(3.5), step=7)  # done again
    assert load_state(place)["model"]["weight"].tolist() == [3.5, 3.5, 3.5]


def test_the_newest_and_the_best_are_kept_at_an_address(store: CheckpointStore[Address]):
    for step, loss in enumerate((0.9, 0.3, None, 0.5, None), start=1):
        store.save(state(step), step=step, validation_loss=loss)
    assert steps_in(store) == [2, 4, 5]


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "no state", "foreign checksum"])
def test_a_checkpoint_damaged_at_an_address_is_set_aside(
    store: CheckpointStore[Address], damage: str, caplog: pytest.LogCaptureFixture
):
    store.save(state(1), step=1)
    place = store.save(state(2), step=2)
    files, folder = memory(place)  # type: ignore[arg-type]
    content = bytearray(files.cat_file(f"{folder}/state.pt"))
    match damage:
        case "flip a bit":
            content[len(content) // 2] ^= 1
            files.pipe_file(f"{folder}/state.pt", bytes(content))
        case "cut":
            files.pipe_file(f"{folder}/state.pt", bytes(content[:-1]))
        case "no state":
            files.rm_file(f"{folder}/state.pt")
        case "foreign checksum":
            files.pipe_file(f"{folder}/sha256", b"\xff")
    with caplog.at_level(logging.WARNING):
        chosen = store.newest_valid()
    assert chosen is not None
    assert step_of(chosen) == 1
    assert "step-00000002 does not match its checksum; set aside as damaged-step-00000002" in caplog.text
    assert steps_in(store) == [1]
    assert files.exists(f"{folder.replace('step-', 'damaged-step-')}/sha256")


def test_a_save_that_an_address_refuses_leaves_the_one_before(
    store: CheckpointStore[Address], monkeypatch: pytest.MonkeyPatch
):
    store.save(state(1), step=1)
    files, _ = memory(store.folder)
    real_open = type(files).open

    def refuse_the_sums(system: Any, path: str, mode: str = "rb", **settings: Any) -> Any:
        if path.endswith("sha256") and "w" in mode:
            raise TypeError("a client of one's own fails as it likes")
        return real_open(system, path, mode, **settings)

    monkeypatch.setattr(type(files), "open", refuse_the_sums)
    with pytest.raises(OSError, match="TypeError: a client of one's own fails as it likes"):
        store.save(state(2), step=2)
    monkeypatch.undo()
    assert steps_in(store) == [1]


def test_what_an_interrupted_save_has_left_at_an_address_is_no_checkpoint(store: CheckpointStore[Address]):
    store.save(state(1), step=1)
    files, folder = memory(store.folder)
    files.pipe_file(f"{folder}/step-00000002/state.pt", b"half of it")
    assert steps_in(store) == [1]
    assert step_of(store.newest_valid()) == 1  # type: ignore[arg-type]
    store.remove_partial()
    assert files.ls(folder, detail=False) == [f"{folder}/step-00000001"]


def test_a_run_in_one_process_resumes_from_an_address_bit_for_bit(write_job: Any, tmp_path: Path):
    address = f"memory://{uuid.uuid4().hex}"
    job = JobSpec.load(write_job(train={"checkpoint_dir": address}))

    def run(name: str, *, stop_after: int | None = None) -> list[float]:
        (tmp_path / name).mkdir(exist_ok=True)
        recorder = Recorder(stop_after=stop_after)
        recorder.checkpoint_saved = lambda *_, **__: None  # type: ignore[method-assign]
        assignment = Assignment(job.to_data(), str(tmp_path), str(tmp_path / name), None)
        train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=recorder)
        return recorder.losses

    def final(name: str) -> Any:
        return load_state(place_of(address, tmp_path / name) / "step-00000009")

    whole = run("whole")
    assert run("parts", stop_after=5) + run("parts") == whole
    assert differences(final("parts"), final("whole")) == []
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_ranks_of_several_processes_continue_from_an_address(write_job: Any, tmp_path: Path):
    def train(checkpoint_dir: str, *more: str, **settings: Any) -> tuple[Path, dict[int, float]]:
        settings = {"workers": 2, "checkpoint_dir": checkpoint_dir, **settings}
        path = write_job(train=settings, budget="none")
        done = subprocess.run(
            [*COMMAND, str(path), "--json", *more], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        losses = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
        return Path(events[-1]["run_dir"]), losses

    # fsspec's own way to this machine's disk: what the ranks write goes through it, not through paths.
    folder, whole = train(f"local://{tmp_path}/remote", keep_checkpoints=1, keep_best=0)
    (checkpoint,) = (tmp_path / "remote" / folder.name).iterdir()
    assert checkpoint.name == "step-00000009"
    other, _ = train(f"file://{tmp_path}/disk", keep_checkpoints=5)
    newest = tmp_path / "disk" / other.name / "step-00000009"
    (newest / "state.pt").write_bytes(b"")
    again, after = train(f"file://{tmp_path}/disk", "--resume", str(other), keep_checkpoints=5)
    assert again == other
    assert after == {step: whole[step] for step in (7, 8, 9)}
    assert newest.with_name("damaged-step-00000009").is_dir()


@pytest.mark.parametrize(
    ("checkpoint_dir", "reason"),
    [
        ("s3://key:geheim@bucket/runs", "holds a password or a query"),
        ("https://host/runs?sig=geheim", "holds a password or a query"),
        ("simplecache::s3://geheim", "chains several file systems"),
        ("s3://[geheim", "is not a URL"),
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(
    write_job: Any, checkpoint_dir: str, reason: str
):
    path = write_job(train={"checkpoint_dir": checkpoint_dir})
    done = subprocess.run([*COMMAND, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "train.checkpoint_dir" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "geheim" not in done.stdout + done.stderr
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("checkpoint_dir", "reason"),
    [
        ("nowhere://bucket", "Protocol not known: nowhere"),
        ("hdfs://127.0.0.1:9/runs", "cannot be used: "),
        ("memory://runs", "the memory of one process ends with it"),
        ("file:///dev/null/runs", "/dev/null is no folder that can be written to"),
    ],
)
def test_a_place_that_cannot_be_used_is_a_sentence(checkpoint_dir: str, reason: str):
    with pytest.raises(WorkloadError) as caught:
        check_place(checkpoint_dir, is_one_process=False)
    assert str(caught.value).startswith(f"train.checkpoint_dir {checkpoint_dir!r} cannot be used: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_place_that_can_be_used_is_left_as_it_was(tmp_path: Path):
    (tmp_path / "there").mkdir()
    check_place(f"local://{tmp_path}/there", is_one_process=False)
    check_place(str(tmp_path / "new" / "folder"), is_one_process=False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
