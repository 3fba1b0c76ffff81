"""Checkpoints: the state of a run on disk, complete or absent, verified when read."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_STATE = "state.pt"
_CHECKSUM = "sha256"
_NAME = re.compile(r"step-(\d{8})")
_CHUNK_BYTES = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class CheckpointStore:
    """A folder of checkpoints, one subfolder per step.

    A checkpoint is written beside its final place, flushed to disk, and then renamed: whoever sees its name
    sees all of it. One that does not match its checksum is renamed to `damaged-...`, and the one before it is
    used.

    Args:
        folder: holds the checkpoints; made when the first is saved.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: dict[str, Any], *, step: int) -> Path:
        """Write one checkpoint and remove those beyond `keep`.

        Args:
            state: tensors and plain containers of plain values only.
            step: steps done.

        Returns:
            The checkpoint's folder.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{step:08d}-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with open(partial / _STATE, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with open(partial / _CHECKSUM, "w", encoding="ascii") as file:
            file.write(_digest(partial / _STATE))
            file.flush()
            os.fsync(file.fileno())
        _fsync_folder(partial)
        if final.exists():  # a step done again after a restart
            shutil.rmtree(final)
        os.rename(partial, final)
        _fsync_folder(self.folder)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def paths(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))

    def newest_valid(self) -> Path | None:
        """The newest checkpoint that matches its checksum; damaged ones are renamed, with a warning."""
        for path in reversed(self.paths()):
            if _is_valid(path):
                return path
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            logger.warning(
                "checkpoint %s does not match its checksum; set aside as %s", path.name, aside.name
            )
        return None

    def remove_partial(self) -> None:
        """Remove what an interrupted save has left."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                if path.name.startswith(".partial-"):
                    shutil.rmtree(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state into host memory.

    Raises:
        CheckpointError: it does not match its checksum.
    """
    if not _is_valid(path):
        raise CheckpointError(f"checkpoint {path} does not match its checksum; resume from an older one")
    return torch.load(path / _STATE, map_location="cpu", weights_only=True)


def step_of(path: Path) -> int:
    """Steps done when the checkpoint was written."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _is_valid(path: Path) -> bool:
    try:
        return _digest(path / _STATE) == (path / _CHECKSUM).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
