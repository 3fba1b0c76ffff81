"""Write a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file next to the path first and move it there when it is complete.

    Args:
        path: a regular file, or nothing yet.
        content: text (UTF-8) or bytes.

    Raises:
        ValueError: the path is something else than a regular file, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is no regular file. Name a file.")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Name another file.") from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path, *, option: str) -> None:
    """Raise ValueError unless a regular file can be written there; better said before a long search than after.

    Args:
        path: of the file.
        option: that named it, such as "--out".
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}. Make it first.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} {path} exists and is no regular file. Name a file.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: the folder {folder} cannot be written. Name another.")
