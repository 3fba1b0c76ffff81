"""Submit a job to a cluster and follow it: Ray's Jobs API."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.failures import RunFailedError
from orchestrator.ray_access import use_token
from planner.inputs.strict import WorkloadError

_CONNECT_TIMEOUT_S = 10.0
_POLL_S = 0.5
_LEFT_BEHIND = ["runs/", ".git/", ".venv/", "__pycache__/", "*.pyc"]
# Relative run folders would lie in the job's working folder, which the cluster removes after the job.
_RUN_DIR = "$HOME/lowtide-runs"
# These would silently replace the address that the user gave.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def submit(job_path: Path, *, address: str, arguments: list[str]) -> str:
    """Send a job's folder to a cluster and start `lowtide train` on it there.

    Args:
        job_path: the job file; everything beside it travels along.
        address: of the Jobs API, such as http://head:8265.
        arguments: for `lowtide train`, beside the file and --json.

    Returns:
        The job's id.

    Raises:
        RunFailedError: the cluster cannot be reached or refuses the job.
    """
    entrypoint = shlex.join(["lowtide", "train", job_path.name, "--json", *arguments])
    if "--run-dir" not in arguments:
        entrypoint += f' --run-dir "{_RUN_DIR}"'
    folder = job_path.resolve().parent
    client = _client(address)
    try:
        return client.submit_job(
            entrypoint=entrypoint, runtime_env={"working_dir": str(folder), "excludes": _LEFT_BEHIND}
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunFailedError(f"{address} refuses the job: {_one_line(error)}", bad_input=True) from error


def follow(job_id: str, *, address: str, write: Callable[[str], None]) -> int:
    """Pass on a job's log until it ends.

    Returns:
        The exit status of its command; 1 where it was stopped or never ran.
    """
    client = _client(address)

    async def pass_on() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    _known(client, job_id)
    asyncio.run(pass_on())
    while True:
        info = _known(client, job_id)
        if info.status.is_terminal():
            break
        asyncio.run(asyncio.sleep(_POLL_S))
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status.value != "SUCCEEDED":
        write(f"{_one_line(info.message or info.status.value)}\n")
        return 1
    return 0


def status(job_id: str, *, address: str) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    return _known(_client(address), job_id).status.value


def logs(job_id: str, *, address: str) -> str:
    """Everything that a job has written so far."""
    client = _client(address)
    _known(client, job_id)
    return client.get_job_logs(job_id)


def stop(job_id: str, *, address: str) -> bool:
    """Ask a job to end, as Ctrl-C does; False where it had ended before."""
    client = _client(address)
    _known(client, job_id)
    return bool(client.stop_job(job_id))


def list_jobs(*, address: str) -> list[tuple[str, str, str]]:
    """(id, status, command) of every job that was submitted to the cluster, oldest first."""
    jobs = [job for job in _client(address).list_jobs() if job.submission_id]
    jobs.sort(key=lambda job: job.start_time or 0)
    return [(job.submission_id or "", job.status.value, job.entrypoint) for job in jobs]


def _client(address: str) -> Any:
    """A client of the Jobs API at exactly this address."""
    _check_reachable(address)
    use_token()
    try:
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient
    except ModuleNotFoundError as error:
        raise RunFailedError(
            "Ray is not installed; install it with pip install 'ray[default,train]'", bad_input=True
        ) from error
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, ValueError, OSError, RayError) as error:
        raise RunFailedError(
            f"no Ray Jobs API answers at {address}: {_one_line(error)}", bad_input=True
        ) from error


def _check_reachable(address: str) -> None:
    """Fail within seconds where nobody answers; any HTTP answer, a refusal too, is somebody."""
    if not address.startswith(("http://", "https://")):
        raise WorkloadError(f"the Jobs API has an address like http://HOST:8265, got {address!r}")
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RunFailedError(
            f"no Ray Jobs API answers at {address} ({_one_line(reason)}); start one with `ray start --head`, and "
            "give the address of its dashboard",
            bad_input=True,
        ) from error


def _known(client: Any, job_id: str) -> Any:
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        raise RunFailedError(
            f"the cluster knows no job {job_id!r}; see `lowtide list`", bad_input=True
        ) from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
