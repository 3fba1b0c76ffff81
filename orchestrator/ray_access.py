"""What Ray needs to be reached without noise: the user's token, and its own messages kept aside."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def use_token() -> None:
    """Show the user's token to clusters that ask for one, if it is at one of the places that Ray documents.

    Ray does so by itself where it starts a cluster, but not where it joins one. Call this before Ray is imported.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(path) if path else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or token.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def stderr_aside() -> Iterator[BinaryIO]:
    """A file that takes what is written to standard error meanwhile, by native code too."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def last_complaint(file: BinaryIO) -> str:
    """The end of the last line in a file of Ray's messages, "" where there is none."""
    file.seek(0)
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if "error" in line]
    return lines[-1].partition("RPC error: ")[2][:200] if lines else ""
