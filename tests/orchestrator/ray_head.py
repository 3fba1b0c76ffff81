"""A Ray head on this machine that ends with the block, and the processes that belong to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

START_S = 240.0


@dataclass(frozen=True)
class Head:
    """Where a head is.

    Attributes:
        jobs: address of its Jobs API.
        cluster: HOST:PORT to join it.
        folder: of its logs and sockets.
    """

    jobs: str
    cluster: str
    folder: Path


def children_of(pid: int) -> set[int]:
    """Every descendant of a process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found - {pid}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for Ray's files: the names of its sockets have at most 107 characters, of which Ray takes 90."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def ray_head(folder: Path, environment: Mapping[str, str]) -> Iterator[Head]:
    """A head of two cores.

    Args:
        folder: for its files, a short one.
        environment: of its processes, beside this one's.
    """
    dashboard, cluster, agent = free_port(), free_port(), free_port()
    everything = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        **environment,
    }
    words = (
        f"start --head --block --num-cpus 2 --port {cluster} --dashboard-port {dashboard} --include-dashboard true "
        f"--dashboard-agent-listen-port {agent} --object-store-memory 100000000 "
        f"--ray-client-server-port {free_port()} --temp-dir {folder}"
    )
    script = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=everything,
        start_new_session=True,
    )
    try:
        deadline_s = time.monotonic() + START_S
        while not (listens(dashboard) and listens(agent)):  # without the second, it takes no jobs yet
            assert process.poll() is None, "the Ray head did not start"
            assert time.monotonic() < deadline_s, "the Ray head does not answer"
            time.sleep(0.3)
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{cluster}", folder)
    finally:
        family = children_of(process.pid)
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
