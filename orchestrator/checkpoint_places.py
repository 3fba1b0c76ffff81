"""Where checkpoints lie: a folder of this machine, or any place that fsspec knows by a URL."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

import fsspec

from orchestrator.failures import one_line
from planner.inputs.strict import WorkloadError

SUMS = "sha256"
"""The file of a checkpoint that is written last: the checksums of all others, as sha256sum(1) reads them."""

_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Address:
    """A place by its URL; plain data that other processes are told.

    >>> str(Address("s3://bucket/runs") / "step-00000001"), (Address("s3://bucket/runs") / "a").name
    ('s3://bucket/runs/step-00000001', 'a')
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """Its last part."""
        return self.url.rpartition("/")[2]


Place = Path | Address


class Files(Protocol):
    """What checkpoints need of a place."""

    def names(self, folder: Any) -> list[str]:
        """What lies in a folder, sorted; nothing where it is not there."""
        ...

    def reading(self, path: Any) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file open for reading."""
        ...

    def writing(self, path: Any) -> contextlib.AbstractContextManager[BinaryIO]:
        """A new file open for writing; what was written stays when the block is left."""
        ...

    def is_visible(self, checkpoint: Any) -> bool:
        """Whether all of a checkpoint was once there."""
        ...

    def begin(self, checkpoint: Any) -> Any:
        """Where the files of a new checkpoint are to be written; nothing lies there."""
        ...

    def publish(self, partial: Any, checkpoint: Any) -> None:
        """Make a checkpoint visible whose files, the sums last, are all written."""
        ...

    def partials(self, folder: Any) -> list[Any]:
        """What interrupted saves have left."""
        ...

    def move(self, checkpoint: Any, name: str) -> None:
        """Give a checkpoint another name beside it."""
        ...

    def remove(self, folder: Any) -> None:
        """Remove a folder that may be there."""
        ...


def files_at(place: Place) -> Files:
    """How to read and write at a place."""
    return _LocalFiles() if isinstance(place, Path) else _RemoteFiles()


def place_of(checkpoint_dir: str | None, run_dir: Path) -> Place:
    """Where the checkpoints of a run lie: in its folder, or in a folder of its name where the job says.

    >>> str(place_of("memory://all/", Path("runs/gpt-1"))), str(place_of("file:///all", Path("runs/gpt-1")))
    ('memory://all/gpt-1', '/all/gpt-1')
    """
    if checkpoint_dir is None:
        return run_dir / "checkpoints"
    parent = checkpoint_dir.removeprefix("file://")
    if "://" in parent:
        return Address(parent.rstrip("/")) / run_dir.name
    return Path(parent).absolute() / run_dir.name


def absolute(checkpoint_dir: str | None) -> str | None:
    """A job's `checkpoint_dir` for processes that are in other folders."""
    if checkpoint_dir is None or "://" in checkpoint_dir:
        return checkpoint_dir
    return str(Path(checkpoint_dir).absolute())


def check_address(checkpoint_dir: str) -> str:
    """Refuse an address that holds what must not be written down; the message does not repeat it.

    Raises:
        ValueError: it has a password or a query, or chains several places.
    """
    if "::" in checkpoint_dir:
        raise ValueError("chains several file systems by '::'; give the address of one")
    if "://" in checkpoint_dir:
        try:
            parts = urlsplit(checkpoint_dir)
            has_secret = parts.password is not None or bool(parts.query)
        except ValueError as error:
            raise ValueError("is not a URL; write it as PROTOCOL://PLACE") from error
        if has_secret:
            raise ValueError(
                "holds a password or a query, which every file of the run would repeat; leave it out, and give "
                "credentials as the storage's own environment variables or configuration"
            )
    return checkpoint_dir


def check_place(checkpoint_dir: str, *, is_one_process: bool) -> None:
    """Write, read back and remove a small file where the checkpoints are to lie.

    Args:
        checkpoint_dir: as the job has it.
        is_one_process: whether the run is this process alone.

    Raises:
        WorkloadError: fsspec does not know the kind of place or a package for it is missing, nothing can be
            written there, or it is the memory of a process that is not the only one.
    """
    sentence = f"train.checkpoint_dir {checkpoint_dir!r} cannot be used: "
    place = checkpoint_dir.removeprefix("file://")
    if "://" not in place:
        path = Path(place).absolute()
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise WorkloadError(f"{sentence}{there} is no folder that can be written to")
        return
    if place.startswith("memory://") and not is_one_process:
        raise WorkloadError(
            f"{sentence}the memory of one process ends with it; give a place that all ranks share"
        )
    probe, content = Address(place.rstrip("/")) / f".probe-{uuid.uuid4().hex}", b"lowtide"
    files = _RemoteFiles()
    try:
        with files.writing(probe / "file") as file:
            file.write(content)
        with files.reading(probe / "file") as file:
            back = file.read()
        files.remove(probe)
    except OSError as error:
        raise WorkloadError(f"{sentence}{error.strerror or one_line(error)}") from error
    if back != content:
        raise WorkloadError(f"{sentence}what is read back is not what was written")


class _LocalFiles:
    """Folders of this machine, or that it sees: a checkpoint is renamed to its name when all of it is on disk."""

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def reading(self, path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
        return open(path, "rb")

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[BinaryIO]:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def is_visible(self, checkpoint: Path) -> bool:
        return checkpoint.is_dir()

    def begin(self, checkpoint: Path) -> Path:
        partial = checkpoint.with_name(f"{_PARTIAL}{checkpoint.name}-{os.getpid()}")
        self.remove(partial)
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, checkpoint: Path) -> None:
        _fsync_folder(partial)
        self.remove(checkpoint)  # a step done again after a restart
        os.rename(partial, checkpoint)
        _fsync_folder(checkpoint.parent)

    def partials(self, folder: Path) -> list[Path]:
        return [folder / name for name in self.names(folder) if name.startswith(_PARTIAL)]

    def move(self, checkpoint: Path, name: str) -> None:
        os.rename(checkpoint, checkpoint.with_name(name))

    def remove(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


class _RemoteFiles:
    """Objects at an address. None can be renamed at once, but each is whole or absent: with its sums, which are
    written last, a checkpoint is there, and without them it is not."""

    def names(self, folder: Address) -> list[str]:
        with _system_of(folder) as (system, path):
            system.invalidate_cache()
            try:
                found = system.ls(path, detail=False)
            except FileNotFoundError:
                return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    @contextlib.contextmanager
    def reading(self, path: Address) -> Iterator[BinaryIO]:
        with _system_of(path) as (system, place), system.open(place, "rb") as file:
            yield cast("BinaryIO", file)

    @contextlib.contextmanager
    def writing(self, path: Address) -> Iterator[BinaryIO]:
        with _system_of(path) as (system, place):
            system.makedirs(place.rpartition("/")[0], exist_ok=True)
            with system.open(place, "wb") as file:
                yield cast("BinaryIO", file)

    def is_visible(self, checkpoint: Address) -> bool:
        with _system_of(checkpoint / SUMS) as (system, path):
            system.invalidate_cache()
            return bool(system.exists(path))

    def begin(self, checkpoint: Address) -> Address:
        self.remove(checkpoint)  # a step done again after a restart, or an interrupted one
        return checkpoint

    def publish(self, partial: Address, checkpoint: Address) -> None:
        """Its sums are there."""

    def partials(self, folder: Address) -> list[Address]:
        found = [folder / name for name in self.names(folder) if name.startswith("step-")]
        return [checkpoint for checkpoint in found if not self.is_visible(checkpoint)]

    def move(self, checkpoint: Address, name: str) -> None:
        with _system_of(checkpoint) as (system, path):
            system.mv(path, f"{path.rpartition('/')[0]}/{name}", recursive=True)

    def remove(self, folder: Address) -> None:
        with _system_of(folder) as (system, path):
            system.invalidate_cache()
            if system.exists(f"{path}/{SUMS}"):  # first, so that no half of it is taken for a checkpoint
                system.rm_file(f"{path}/{SUMS}")
            if system.exists(path):
                system.rm(path, recursive=True)


@contextlib.contextmanager
def _system_of(place: Address) -> Iterator[tuple[Any, str]]:
    """The file system of an address and the path in it; what goes wrong with them is an OSError."""
    try:
        system, path = fsspec.core.url_to_fs(place.url)
        yield system, path.rstrip("/")
    except OSError:
        raise
    except Exception as error:  # each kind of place has errors of its own, which share no class
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from error


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
