"""Reaching a Ray cluster without noise: is it there, the user's token, its own messages kept aside."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from orchestrator.failures import RunFailedError

_CONNECT_TIMEOUT_S = 10.0
_HTTP_TIMEOUT_S = 2.0


def use_token() -> None:
    """Show the user's token to clusters that ask for one, if it is at one of the places that Ray documents.

    Ray does so by itself where it starts a cluster, but not where it joins one. Call this before Ray is imported.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(path) if path else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or token.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_reachable(address: str) -> None:
    """Fail within seconds, not minutes, where nobody listens.

    Raises:
        RunFailedError: no cluster is there.
    """
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise RunFailedError(
            f"{address} is the address of Ray's Jobs API; give it to `lowtide submit`, or HOST:6379 here",
            bad_input=True,
        )
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()) or "//" in host:
        raise RunFailedError(f"--address must be HOST:PORT or auto, got {address!r}", bad_input=True)
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S) as connection:
            is_http = _speaks_http(connection)
    except OSError as error:
        raise RunFailedError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with "
            "`ray start --head`, or leave --address out to run on this machine",
            bad_input=True,
        ) from error
    if is_http:
        raise RunFailedError(
            f"{address} answers HTTP, so it is not a Ray cluster's port; `ray start --head` prints that",
            bad_input=True,
        )


def _speaks_http(connection: socket.socket) -> bool:
    """Whether the other side answers a plain HTTP request, as a dashboard does and Ray's own port does not."""
    connection.settimeout(_HTTP_TIMEOUT_S)
    try:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(7) == b"HTTP/1."
    except OSError:
        return False


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
