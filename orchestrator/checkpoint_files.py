"""The files of one checkpoint: each is written, read back and summed; the sums come last."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import torch

from orchestrator.checkpoint_places import SUMS, Place, files_at
from orchestrator.failures import CheckpointError

STATE = "state.pt"
VALIDATION_LOSS = "validation_loss"
_CHUNK_BYTES = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64})(?:  ([A-Za-z0-9._-]+))?")


class NewCheckpoint:
    """A checkpoint that is being written, and seen when it is finished.

    Args:
        place: its place, under its name.

    Attributes:
        partial: where its files are written until then.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._files = files_at(place)
        self.partial = self._files.begin(place)
        self._sums: dict[str, str] = {}

    def add(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self.add_written(name, write_file(self.partial / name, lambda file: file.write(content)))

    def add_written(self, name: str, digest: str) -> None:
        """Take in a file of `partial` that `write_file` has written, here or in another process."""
        self._sums[name] = digest

    def finish(self, state: dict[str, Any], *, validation_loss: float | None) -> None:
        """Write what is left of it and make it visible.

        Args:
            state: tensors and plain containers of plain values only.
            validation_loss: None where it is not known.
        """
        digest = write_file(self.partial / STATE, lambda file: _save(state, file))
        if validation_loss is not None:
            self.add(VALIDATION_LOSS, repr(validation_loss).encode())
        # The state's sum is the last line: it tells that no line before it is missing.
        sums = {**self._sums, STATE: digest}
        text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        write_file(self.partial / SUMS, lambda file: file.write(text.encode()))
        self._files.publish(self.partial, self.place)

    def abandon(self) -> None:
        """Remove what was written of it."""
        self._files.remove(self.partial)


def write_file(place: Place, write: Callable[[BinaryIO], Any]) -> str:
    """Write a file and read it back.

    Args:
        place: of the file.
        write: called with it, open.

    Returns:
        The checksum of what was meant to be written.

    Raises:
        OSError: it could not be written, or what is read back differs.
    """
    with files_at(place).writing(place) as file:
        hashed = _Hashed(file)
        try:
            write(cast("BinaryIO", hashed))
        except RuntimeError:  # of torch, which then cannot end its file, in place of the system's own
            if hashed.error is not None:
                raise hashed.error from None
            raise
    if digest_of(place) != hashed.hexdigest():
        raise OSError(errno.EIO, "what was read back differs from what was written")
    return hashed.hexdigest()


def digest_of(place: Place) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with files_at(place).reading(place) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sums_of(checkpoint: Place) -> dict[str, str]:
    """Name of each of a checkpoint's files -> its checksum; {} where they cannot be trusted.

    One checksum alone, as earlier versions wrote, is the state's.
    """
    try:
        with files_at(checkpoint).reading(checkpoint / SUMS) as file:
            lines = [_LINE.fullmatch(line) for line in file.read().decode("ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return {}
    found = {match[2] or STATE: match[1] for match in lines if match is not None}
    return found if len(found) == len(lines) and list(found)[-1:] == [STATE] else {}


def is_valid(checkpoint: Place) -> bool:
    """Whether every file of a checkpoint matches its checksum."""
    sums = sums_of(checkpoint)
    try:
        return bool(sums) and all(digest_of(checkpoint / name) == digest for name, digest in sums.items())
    except OSError:
        return False


def verify_file(checkpoint: Place, name: str) -> None:
    """Compare one file of a checkpoint with its checksum.

    Raises:
        CheckpointError: it differs, or one of them is not there.
    """
    with contextlib.suppress(OSError):
        if digest_of(checkpoint / name) == sums_of(checkpoint).get(name):
            return
    raise CheckpointError(
        f"checkpoint {checkpoint} does not match its checksum in {name}; resume from an older one"
    )


def validation_loss_of(checkpoint: Place) -> float | None:
    """The validation loss of a checkpoint's weights; None where it was not measured."""
    try:
        with files_at(checkpoint).reading(checkpoint / VALIDATION_LOSS) as file:
            return float(file.read())
    except (OSError, ValueError):
        return None


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    torch.save(state, file)


class _Hashed:
    """Passes bytes on to a file, and keeps their checksum: of what was meant, whatever then lies on the disk.

    Args:
        file: open for writing.

    Attributes:
        error: why it could not be written; None where it could.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write all of it."""
        self._digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """As the file's."""
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    def hexdigest(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()
