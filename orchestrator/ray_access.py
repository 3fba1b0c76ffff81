"""Reaching a Ray cluster without noise: is it there, the user's token, its own messages kept aside."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.failures import RunFailedError

_CONNECT_TIMEOUT_S = 10.0
_HTTP_TIMEOUT_S = 2.0
_DEFAULT_TOKEN = Path("~/.ray/auth_token")
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


def use_token(*, to_join: bool) -> None:
    """Show the user's token to clusters that ask for one, if it is at one of the places that Ray documents.

    Ray does so by itself where it starts a cluster, but not where it joins one. Call this before Ray is imported.

    Args:
        to_join: the process becomes part of the cluster, and then asks the cluster for the token as well: one that
            has none cannot talk to it. So a token must be meant for this cluster, by a variable; the file in the
            home folder, which may be of another one, is for the Jobs API alone.

    Raises:
        RunFailedError: the file that RAY_AUTH_TOKEN_PATH names is not there, or is empty.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN"):
        try:
            is_empty = not Path(path).read_bytes().strip()
        except OSError as error:
            raise RunFailedError(
                f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read: {error.strerror}", bad_input=True
            ) from error
        if is_empty:
            raise RunFailedError(f"RAY_AUTH_TOKEN_PATH names {path}, which is empty", bad_input=True)
    is_at_home = not to_join and _DEFAULT_TOKEN.expanduser().is_file()
    if os.environ.get("RAY_AUTH_TOKEN") or path or is_at_home:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def describe_token() -> str:
    """Where the user's token is, never what it is."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or str(_DEFAULT_TOKEN)


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


def dashboard_of(ray: Any) -> str:
    """The address of a cluster's dashboard, "" where it has none.

    Args:
        ray: the module, connected; what `ray.init` returns says the same, but only to who has called it.
    """
    place = ray._private.worker._global_node.webui_url or ""
    return place if "://" in place or not place else f"http://{place}"


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


def explain_refusal(error: Exception, file: BinaryIO) -> str:
    """Why Ray does not let this process join a cluster, in a clause.

    Args:
        error: what joining has raised.
        file: what Ray has said meanwhile.
    """
    versions = _VERSIONS.findall(str(error)) if "Version mismatch" in str(error) else []
    if len(versions) == 2:
        (ray_there, python_there), (ray_here, python_here) = versions
        return (
            f"it runs Ray {ray_there} on Python {python_there}, and this process Ray {ray_here} on Python "
            f"{python_here}; install the same here"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = last_complaint(file) or (lines[0] if lines else type(error).__name__)
    is_unused = "RAY_AUTH_MODE" not in os.environ and _DEFAULT_TOKEN.expanduser().is_file()
    if "AuthToken" in reason and is_unused:
        reason += f"; if the token in {_DEFAULT_TOKEN} is of this cluster, set RAY_AUTH_MODE=token"
    return reason
