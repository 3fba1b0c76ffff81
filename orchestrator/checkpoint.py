"""Checkpoints: the state of a run, complete or absent, verified when read."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch

from orchestrator.checkpoint_files import STATE, NewCheckpoint, is_valid, validation_loss_of, verify_file
from orchestrator.checkpoint_places import Place, files_at
from orchestrator.checkpoint_shards import ShardReader, with_saved_tensors, with_whole_tensors
from orchestrator.failures import CheckpointError

__all__ = ["CheckpointError", "CheckpointStore", "load_state", "names_to_keep", "open_state", "step_of"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
P = TypeVar("P", bound=Place)


class CheckpointStore(Generic[P]):
    """A folder of checkpoints, one subfolder per step, on a disk or at an address.

    Whoever sees the name of a checkpoint sees all of it; see `checkpoint_places`. One that does not match its
    checksums is renamed to `damaged-...`, and the one before it is used.

    Args:
        folder: holds the checkpoints; made when the first is saved.
        keep: how many of the newest stay.
        keep_best: how many of those with the least validation loss stay beside them.
    """

    def __init__(self, folder: P, *, keep: int, keep_best: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_best = keep_best
        self._files = files_at(folder)

    def save(self, state: dict[str, Any], *, step: int, validation_loss: float | None = None) -> Place:
        """Write one checkpoint and remove those that the store does not keep.

        Args:
            state: tensors and plain containers of plain values only.
            step: steps done.
            validation_loss: of the same weights; None where it was not measured at this step.

        Returns:
            The checkpoint's place.

        Raises:
            OSError: it could not be written. What was written of it is removed, and the others stay.
        """
        new = self.begin(step)
        try:
            new.finish(state, validation_loss=validation_loss)
        except OSError:
            new.abandon()
            raise
        self.remove_old()
        return new.place

    def begin(self, step: int) -> NewCheckpoint:
        """A checkpoint of which nothing is written yet."""
        return NewCheckpoint(self.folder / f"step-{step:08d}")

    def remove_old(self) -> None:
        """Remove what the store does not keep."""
        losses = {path.name: validation_loss_of(path) for path in self.paths()}
        for name in losses.keys() - names_to_keep(losses, newest=self.keep, best=self.keep_best):
            self._files.remove(self.folder / name)

    def paths(self) -> list[P]:
        """Complete checkpoints, oldest first."""
        found: list[Any] = [
            self.folder / name for name in self._files.names(self.folder) if _NAME.fullmatch(name)
        ]
        return [path for path in found if self._files.is_visible(path)]

    def newest_valid(self) -> P | None:
        """The newest checkpoint that matches its checksums; damaged ones are renamed, with a warning."""
        for path in reversed(self.paths()):
            if is_valid(path):
                return path
            aside = f"damaged-{path.name}"
            self._files.remove(self.folder / aside)
            self._files.move(path, aside)
            logger.warning("checkpoint %s does not match its checksum; set aside as %s", path.name, aside)
        return None

    def sees(self, checkpoint: Place) -> bool:
        """Whether this process sees a checkpoint that another one has found."""
        return self._files.is_visible(checkpoint)

    def remove_partial(self) -> None:
        """Remove what an interrupted save has left."""
        for partial in self._files.partials(self.folder):
            self._files.remove(partial)


def names_to_keep(losses: Mapping[str, float | None], *, newest: int, best: int) -> set[str]:
    """Which checkpoints stay: the newest, and those with the least validation loss; of equal ones the later.

    Args:
        losses: name of each -> its validation loss, None where there is none.
        newest: how many, at least 1.
        best: how many.

    >>> sorted(names_to_keep({"step-1": 0.5, "step-2": 0.7, "step-3": None, "step-4": None}, newest=2, best=1))
    ['step-1', 'step-3', 'step-4']
    """
    names = sorted(losses, reverse=True)
    known = [(loss, name) for name in names if (loss := losses[name]) is not None and not math.isnan(loss)]
    known.sort(key=lambda pair: pair[0])
    return {*names[:newest], *(name for _, name in known[:best])}


def open_state(path: Place) -> dict[str, Any]:
    """A checkpoint's state in host memory, but with a `SavedTensor` for each tensor that ranks have shared.

    Each file is verified before anything in it is used, and a rank reads those that it needs.

    Raises:
        CheckpointError: it does not match its checksum.
    """
    verify_file(path, STATE)
    with files_at(path).reading(path / STATE) as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    return with_saved_tensors(state, ShardReader(path))


def load_state(path: Place) -> dict[str, Any]:
    """Read a checkpoint's whole state into host memory.

    Raises:
        CheckpointError: it does not match its checksums.
    """
    return with_whole_tensors(open_state(path))


def step_of(path: Place) -> int:
    """Steps done when the checkpoint was written."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])
