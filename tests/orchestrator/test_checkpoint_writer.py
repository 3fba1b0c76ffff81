"""Checkpoints that are written beside the training: what is in them, who waits, what a full disk leaves."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import CheckpointStore, load_state, step_of
from orchestrator.checkpoint_writer import CheckpointWriteError, CheckpointWriter, copied


def store_of(tmp_path: Path, *, keep: int = 2, keep_best: int = 0) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=keep, keep_best=keep_best)


def steps_in(store: CheckpointStore) -> list[int]:
    return [step_of(path) for path in store.paths()]


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, may_write = store_of(tmp_path), threading.Event()
    real_save = torch.save

    def slow_save(*arguments: Any) -> None:
        assert may_write.wait(30)
        real_save(*arguments)

    monkeypatch.setattr(torch, "save", slow_save)
    weight, writer = torch.ones(3), CheckpointWriter(store)
    writer.start({"weight": weight, "step": [1]}, step=1, validation_loss=None)
    weight += 1  # the next step, before anything is written
    may_write.set()
    path = writer.settle(is_last=True)
    assert path is not None
    assert load_state(path)["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", ["plain", "scalar", "empty", "transposed"])
def test_a_copy_has_the_same_bits_and_strides_and_no_memory_in_common(dtype: torch.dtype, kind: str):
    whole = torch.arange(6).view(2, 3).to(dtype)
    tensor = {"plain": whole, "scalar": whole[1, 2].clone(), "empty": whole[:0], "transposed": whole.T}[kind]
    copy = copied({"a": [tensor]})["a"][0]
    assert (copy.dtype, copy.shape, copy.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(copy, tensor)
    if tensor.numel():
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_tensors_that_are_one_are_one_in_the_copy():
    weight = torch.ones(3)
    copy = copied({"embedding": weight, "head": weight, "more": torch.ones(3)})
    assert copy["embedding"] is copy["head"]
    assert copy["embedding"] is not copy["more"]


def test_a_copy_takes_nothing_from_torchs_allocator():
    state = {"weight": torch.ones(1 << 18), "half": torch.ones(1 << 10, dtype=torch.bfloat16)}
    with torch.profiler.profile(profile_memory=True) as profile:
        copied(state)
    taken = [
        event
        for event in profile.events() or []
        if event.name == "[memory]" and event.self_cpu_memory_usage > 0
    ]
    assert taken == []


@pytest.fixture
def small_disk():
    """Let no file grow beyond 1 MiB: the system refuses the write itself, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]) if on else before)

    yield limit
    limit(False)


def test_a_disk_that_is_full_keeps_the_checkpoint_before_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, small_disk: Any
):
    store = store_of(tmp_path)
    writer, state = CheckpointWriter(store), {"weight": torch.ones(1 << 20)}  # 4 MiB
    writer.start(state, step=1, validation_loss=None)
    assert writer.settle(is_last=False) is not None
    small_disk(True)
    writer.start(state, step=2, validation_loss=None)
    with caplog.at_level(logging.WARNING):
        place = writer.settle(is_last=False)
    small_disk(False)
    assert place is None
    assert (
        "the checkpoint of step 2 could not be written (File too large); those before it stay" in caplog.text
    )
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001"]
    chosen = store.newest_valid()
    assert chosen is not None
    assert step_of(chosen) == 1
    writer.start(state, step=3, validation_loss=None)
    writer.settle(is_last=True)
    assert steps_in(store) == [1, 3]


class FullStore(CheckpointStore):
    """One whose disk is full."""

    def save(self, state: dict[str, Any], *, step: int, validation_loss: float | None = None) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_training_stops_after_three_failures_in_a_row_or_where_the_last_one_fails(tmp_path: Path):
    writer = CheckpointWriter(FullStore(tmp_path, keep=1))
    for step in (1, 2):
        writer.start({}, step=step, validation_loss=None)
        assert writer.settle(is_last=False) is None
    writer.start({}, step=3, validation_loss=None)
    with pytest.raises(CheckpointWriteError, match=r"step 3 .*\(No space left on device\), 3 in a row"):
        writer.settle(is_last=False)

    other = CheckpointWriter(FullStore(tmp_path, keep=1))
    other.start({}, step=9, validation_loss=None)
    with pytest.raises(CheckpointWriteError, match=r"step 9 .* Make room and continue with --resume"):
        other.settle(is_last=True)


def test_what_is_read_back_otherwise_than_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = store_of(tmp_path)
    store.save({"weight": torch.ones(3)}, step=1)
    sync = os.fsync
    is_spoilt = False

    def spoil(descriptor: int) -> None:
        nonlocal is_spoilt
        sync(descriptor)
        if not is_spoilt:  # the first file is the state
            (path,) = store.folder.glob(".partial-*/state.pt")
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            is_spoilt = True

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(OSError, match="what was read back differs from what was written"):
        store.save({"weight": torch.ones(3)}, step=2)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001"]


def test_the_best_stays_beside_the_newest(tmp_path: Path):
    store = store_of(tmp_path, keep=1, keep_best=1)
    for step, loss in enumerate((0.9, 0.3, None, 0.3, float("nan"), 0.5), start=1):
        store.save({}, step=step, validation_loss=loss)
    # Of the two with 0.3 the later stays; step 6 is the newest.
    assert steps_in(store) == [4, 6]
