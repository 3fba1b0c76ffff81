"""Checkpoints of ranks that share a model: each writes its part, any number of ranks reads them, none holds all."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator import sharding
from orchestrator.checkpoint import CheckpointError, CheckpointStore, load_state, open_state, step_of
from orchestrator.checkpoint_places import Address, place_of
from orchestrator.checkpoint_shards import SavedTensor
from orchestrator.checkpoint_sharing import SharedStore
from orchestrator.checkpoint_writer import copied
from orchestrator.job import JobSpec
from orchestrator.worker import Assignment, train_rank
from tests.orchestrator.conftest import job_writer
from tests.orchestrator.test_sharded_ranks import BLOCKS, Quiet
from tests.orchestrator.test_training import differences
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

WIDE = 300


def model_of(rank: int) -> nn.Module:
    """Sharded; its rows are shared unevenly, and one rank of three has nothing of the last parameter."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 2))
    return sharding.shard(model, blocks=("0",), reshard_after_forward=True, device=torch.device("cpu"))


def whole_model() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 2)).state_dict()


def save(rank: int, address: Any) -> str | None:
    """Save the model, and change it while the copy is being written."""
    model = model_of(rank)
    store = SharedStore(CheckpointStore(address, keep=2), is_first=rank == 0)
    state = copied({"model": model.state_dict(), "progress": {"step": 3}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    place = store.save(state, step=3)
    return None if place is None else str(place)


def save_with_a_full_disk(rank: int, folder: Path) -> tuple[str, str | None]:
    """Save once, and again when rank 1 cannot write; say what this rank is told."""
    model = model_of(rank)
    store = SharedStore(CheckpointStore(folder, keep=2), is_first=rank == 0)
    state = copied({"model": model.state_dict()})
    store.save(state, step=1)
    if rank == 1:
        real_fsync = os.fsync

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    try:
        store.save(state, step=2)
    except OSError as error:
        told = str(error)
    else:
        told = "nothing"
    if rank == 1:
        os.fsync = real_fsync
    return told, str(store.save(state, step=3))


def load(rank: int, checkpoint: Any) -> dict[str, tuple[int, float]]:
    """Load into a model of zeros: of each parameter this rank's numbers and the farthest from what was saved."""
    model = model_of(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(sharding.model_state_like(open_state(checkpoint)["model"], model.state_dict()))
    expected = whole_model()
    found = {}
    for name, parameter in model.state_dict().items():
        own = sharding.sharded_like(expected[name], parameter, what=name).to_local()
        distance = (parameter.to_local() - own).abs().max() if own.numel() else torch.zeros(())
        found[name] = own.numel(), float(distance)
    return found


def train(rank: int, assignment: Assignment, world_size: int, stop_after: int | None) -> list[float]:
    reporter = Quiet(stop_after=stop_after)
    train_rank(assignment, rank=rank, world_size=world_size, device_index=0, reporter=reporter)
    return reporter.losses


def all_in_turn(rank: int, calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What each call returns on this rank: starting ranks takes longer than what they do."""
    return {name: function(rank, *arguments) for name, (function, *arguments) in calls.items()}


class Shared:
    """What three ranks have done in `folder`, and then two."""

    def __init__(self, folder: Path) -> None:
        (folder / "blocks.py").write_text(BLOCKS.replace("Dropout(0.1)", "Dropout(0.0)"))
        (folder / "moved").mkdir()
        (folder / "fixed").mkdir()
        self.folder, self.write_job = folder, job_writer(folder)
        self.checkpoint = folder / "saved" / "step-00000003"
        self.address = Address(f"local://{folder}/there")
        self.three = on_ranks(
            all_in_turn,
            {
                "save": (save, folder / "saved"),
                "save at an address": (save, self.address),
                "load": (load, self.checkpoint),
                "moved": (train, self.assignment("moved", workers=3), 3, 3),
            },
            world_size=3,
        )
        self.two = on_ranks(
            all_in_turn,
            {
                "load": (load, self.checkpoint),
                "full disk": (save_with_a_full_disk, folder / "full"),
                "moved": (train, self.assignment("moved", workers=2), 2, 3),
                "fixed": (train, self.assignment("fixed", workers=2), 2, None),
            },
            world_size=2,
        )

    def assignment(self, name: str, *, workers: int) -> Assignment:
        settings = {
            "workers": workers,
            "accumulation": 6 // workers,
            "steps": 9,
            "sharding": "fsdp" if workers > 1 else "ddp",
            "checkpoint_dir": str(self.folder / "all"),
        }
        batch = {"inputs": {"shape": [4, 8]}, "targets": {"shape": [4], "dtype": "int64", "high": 4}}
        job = {"model": "blocks.py:net", "loss": "blocks.py:loss", "batch": batch}
        read = JobSpec.load(self.write_job(train=settings, optimizer={"name": "adamw", "lr": 0.01}, **job))
        return Assignment(read.to_data(), str(self.folder), str(self.folder / name), None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def saved(shared: Shared) -> Path:
    """A checkpoint of three ranks."""
    return shared.checkpoint


def test_each_rank_writes_its_part_and_none_of_them_the_whole(saved: Path):
    names = {path.name for path in saved.iterdir()}
    shards = [f"shard-{rank:05d}.bin" for rank in range(3)]
    assert names == {*shards, "shards.json", "state.pt", "sha256"}
    # Rows of 300 x 300 + 300: 100 a rank. Of 2 x 300 + 2: one for rank 0, one for rank 1. Four bytes a number.
    parts = [100 * 301 * 4 + 301 * 4, 100 * 301 * 4 + 301 * 4, 100 * 301 * 4]
    assert [(saved / name).stat().st_size for name in shards] == parts
    assert differences(load_state(saved)["model"], dict(whole_model())) == []


def test_any_number_of_ranks_reads_its_share_bit_for_bit(shared: Shared):
    for ranks in (shared.two, shared.three):
        found = [rank["load"] for rank in ranks]
        assert {distance for rank in found for _, distance in rank.values()} == {0.0}
        assert [rank["0.weight"][0] for rank in found] == [WIDE * WIDE // len(ranks)] * len(ranks)


def test_shards_lie_at_an_address_too(shared: Shared):
    checkpoint = shared.address / "step-00000003"
    assert [rank["save at an address"] for rank in shared.three] == [str(checkpoint), None, None]
    there = shared.folder / "there" / "step-00000003"
    assert {path.name for path in there.iterdir()} == {path.name for path in shared.checkpoint.iterdir()}
    assert differences(load_state(checkpoint), load_state(shared.checkpoint)) == []


@pytest.mark.parametrize("name", ["shard-00001.bin", "shards.json", "state.pt", "sha256"])
def test_a_bit_flipped_in_any_file_sets_the_checkpoint_aside(
    saved: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    store = CheckpointStore(tmp_path, keep=5)
    store.save({"model": {}}, step=1)
    damaged = tmp_path / "step-00000003"
    damaged.mkdir()
    for path in saved.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_state(damaged)
    with caplog.at_level(logging.WARNING):
        chosen = store.newest_valid()
    assert chosen is not None
    assert step_of(chosen) == 1
    assert damaged.with_name("damaged-step-00000003").is_dir()


def test_a_shard_that_changes_after_the_checkpoint_was_chosen_is_not_read(saved: Path, tmp_path: Path):
    copy = tmp_path / "step-00000003"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state = open_state(copy)
    weight = state["model"]["0.weight"]
    assert isinstance(weight, SavedTensor)
    for shard in copy.glob("shard-*.bin"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"does not match its checksum in shard-0000\d.bin"):
        weight.whole()


def test_reading_shards_unpickles_nothing_but_plain_weights(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert load_state(saved)["progress"] == {"step": 3}  # state.pt: torch's own reader of weights only
    assert set(json.loads((saved / "shards.json").read_text())) == {f"model/{name}" for name in whole_model()}


def test_a_disk_that_is_full_for_one_rank_keeps_the_checkpoint_before(shared: Shared):
    told = [rank["full disk"][0] for rank in shared.two]
    assert told == [f"[Errno {errno.ENOSPC}] rank 1: No space left on device"] * 2
    names = sorted(path.name for path in (shared.folder / "full").iterdir())
    assert names == ["step-00000001", "step-00000003"]


def test_a_run_of_three_sharing_ranks_goes_on_with_two_and_with_one(shared: Shared):
    fixed = shared.two[0]["fixed"]
    alone = train(0, shared.assignment("moved", workers=1), 1, None)
    moved = [*shared.three[0]["moved"], *shared.two[0]["moved"], *alone]
    # Sums over other shares round otherwise.
    assert moved == pytest.approx(fixed, rel=1e-5)
    folder = place_of(str(shared.folder / "all"), shared.folder / "moved")
    assert isinstance(folder, Path)
    names = [{path.name for path in (folder / f"step-{step:08d}").iterdir()} for step in (6, 9)]
    assert names == [
        {"shard-00000.bin", "shard-00001.bin", "shards.json", "state.pt", "sha256"},
        {"state.pt", "sha256", "validation_loss"},
    ]
