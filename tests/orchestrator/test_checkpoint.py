"""Checkpoints: complete or absent, verified when read, the newest valid one wins."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import CheckpointError, CheckpointStore, load_state, step_of

CPU = torch.device("cpu")


def state(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((3,), value)}, "progress": {"step": 1, "loss": None}}


def store_of(tmp_path: Path, *, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=keep)


def test_what_was_saved_is_read_back(tmp_path: Path):
    path = store_of(tmp_path).save(state(2.5), step=7)
    read = load_state(path)
    assert step_of(path) == 7
    assert read["model"]["weight"].tolist() == [2.5, 2.5, 2.5]
    assert read["progress"] == {"step": 1, "loss": None}


def test_only_the_newest_are_kept(tmp_path: Path):
    store = store_of(tmp_path, keep=2)
    for step in (1, 2, 10):
        store.save(state(step), step=step)
    assert [step_of(path) for path in store.paths()] == [2, 10]


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "no checksum", "no state", "foreign checksum"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    store = store_of(tmp_path)
    store.save(state(1), step=1)
    newest = store.save(state(2), step=2)
    content = bytearray((newest / "state.pt").read_bytes())
    match damage:
        case "flip a bit":
            content[len(content) // 2] ^= 1
            (newest / "state.pt").write_bytes(content)
        case "cut":
            (newest / "state.pt").write_bytes(content[:-1])
        case "no checksum":
            (newest / "sha256").unlink()
        case "no state":
            (newest / "state.pt").unlink()
        case "foreign checksum":
            (newest / "sha256").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_state(newest)
    with caplog.at_level(logging.WARNING):
        chosen = store.newest_valid()
    assert chosen is not None
    assert load_state(chosen)["model"]["weight"].tolist() == [1, 1, 1]
    assert (tmp_path / "checkpoints" / "damaged-step-00000002").is_dir()
    assert "step-00000002 does not match its checksum" in caplog.text


def test_there_is_no_checkpoint_where_none_was_saved_or_all_are_damaged(tmp_path: Path):
    store = store_of(tmp_path)
    assert store.newest_valid() is None
    (store.save(state(1), step=1) / "state.pt").write_bytes(b"")
    assert store.newest_valid() is None


def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = store_of(tmp_path)
    store.save(state(1), step=1)

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "rename", power_cut)
    with pytest.raises(OSError, match="power cut"):
        store.save(state(2), step=2)
    monkeypatch.undo()
    chosen = store.newest_valid()
    assert chosen is not None
    assert step_of(chosen) == 1
    store.remove_partial()
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001"]


def test_a_step_done_again_replaces_its_checkpoint(tmp_path: Path):
    store = store_of(tmp_path)
    store.save(state(1), step=5)
    path = store.save(state(2), step=5)
    assert load_state(path)["model"]["weight"].tolist() == [2, 2, 2]


def test_reading_a_checkpoint_runs_no_code(tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    path = store_of(tmp_path).save({"model": Payload()}, step=1)
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state(path)
    assert not (tmp_path / "run").exists()
