"""Submit a job to a cluster and follow it: Ray's Jobs API."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.failures import RunFailedError, one_line
from orchestrator.job_following import follow_log
from orchestrator.ray_access import describe_token, use_token
from orchestrator.submission import Submission
from planner.inputs.strict import WorkloadError

_CONNECT_TIMEOUT_S = 10.0
_AGENT_S = 60.0
_NO_AGENT = "No available agent to submit job"
# What lowtide itself needs, there as here.
_OLDEST_RAY = (2, 51)
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
# A run's length is kept with the job, so that whoever follows it can say how far it is.
_LENGTH = "lowtide."


def submit(
    job_path: Path, *, address: str, arguments: list[str], length: Mapping[str, int], submission: Submission
) -> str:
    """Send a job's folder to a cluster and start `lowtide train` on it there.

    Args:
        job_path: the job file; everything beside it travels along. With an image, a file of the image.
        address: of the Jobs API, such as http://head:8265.
        arguments: for `lowtide train`, beside the file and --json.
        length: "steps" of the run and samples of a "batch", what is known of them.
        submission: its name, environment, resources and metadata.

    Returns:
        The job's id.

    Raises:
        RunFailedError: the cluster cannot be reached or refuses the job.
    """
    in_image = submission.image is not None
    entrypoint = shlex.join(
        ["lowtide", "train", str(job_path) if in_image else job_path.name, "--json", *arguments]
    )
    if "--run-dir" not in arguments:
        entrypoint += f' --run-dir "{_RUN_DIR}"'
    place: dict[str, Any] = (
        {"image_uri": submission.image}
        if in_image
        else {"working_dir": str(job_path.resolve().parent), "excludes": _LEFT_BEHIND}
    )
    if submission.environment:
        place["env_vars"] = dict(submission.environment)
    client = _client(address)
    if submission.job_id is not None and _find(client, submission.job_id) is not None:
        raise RunFailedError(
            f"the cluster has a job named {submission.job_id!r} already; give another --id, or follow it with "
            f"`lowtide logs {submission.job_id} --follow`",
            bad_input=True,
        )
    try:
        return _submitted(
            client,
            entrypoint=entrypoint,
            runtime_env=place,
            submission_id=submission.job_id,
            metadata={**{_LENGTH + key: str(value) for key, value in length.items()}, **submission.metadata},
            entrypoint_num_cpus=submission.num_cpus,
            entrypoint_num_gpus=submission.num_gpus,
            entrypoint_memory=submission.memory_bytes,
            entrypoint_resources=dict(submission.resources) or None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunFailedError(f"{address} refuses the job: {_reason(error)}", bad_input=True) from error


def _submitted(client: Any, **sent: Any) -> str:
    """Send a job; a head that has just started takes jobs some seconds after it answers.

    The job has a name before it is sent, so that one that did arrive over a lost connection is not sent again.
    """
    name = sent["submission_id"] = sent["submission_id"] or f"raysubmit_{secrets.token_hex(8)}"
    deadline_s = time.monotonic() + _AGENT_S
    while True:
        try:
            return client.submit_job(**sent)
        except (RuntimeError, OSError) as error:
            is_early = _NO_AGENT in str(error) or isinstance(error, OSError)
            if not is_early or time.monotonic() > deadline_s:
                raise
            time.sleep(1.0)
            with contextlib.suppress(OSError):
                if isinstance(error, OSError) and _find(client, name) is not None:
                    return name


def follow(
    job_id: str, *, address: str, write: Callable[[str], None], say: Callable[[str], None] = lambda _: None
) -> int:
    """Pass on a job's log until it ends, over as many connections as that takes.

    Args:
        job_id: of the job.
        address: of the Jobs API.
        write: called with the next piece of the log; every character comes once.
        say: called with a sentence where the connection is lost.

    Returns:
        The exit status of its command; 1 where it was stopped or never ran.

    Raises:
        RunFailedError: the connection stayed away.
    """
    client = _client(address)
    _known(client, job_id)
    info = follow_log(
        lambda: client.tail_job_logs(job_id),
        lambda: _known(client, job_id),
        write=write,
        say=say,
        lost=f"{address} does not answer",
        again=f"lowtide logs {job_id} --address {address} --follow",
    )
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status.value != "SUCCEEDED":
        write(f"{one_line(info.message or info.status.value)}\n")
        return 1
    return 0


def length_of(job_id: str, *, address: str) -> dict[str, int]:
    """The length that a run was submitted with; {} where it was submitted in another way."""
    metadata = _known(_client(address), job_id).metadata or {}
    return {
        key.removeprefix(_LENGTH): int(text)
        for key, text in metadata.items()
        if key.startswith(_LENGTH) and text.isdecimal()
    }


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
    use_token(to_join=False)
    try:
        from ray.exceptions import AuthenticationError, RayError
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
        # The file of trusted authorities that Python's own connections use; Ray's would not look there.
        return JobSubmissionClient(address, verify=os.environ.get("SSL_CERT_FILE") or True)
    except AuthenticationError as error:
        raise RunFailedError(f"{address} {_token_fault(error)}", bad_input=True) from error
    except (RuntimeError, ValueError, OSError, RayError) as error:
        raise RunFailedError(
            f"no Ray Jobs API answers at {address}: {_reason(error)}", bad_input=True
        ) from error


def _token_fault(error: Exception) -> str:
    where = describe_token()
    if "Authentication failed" in str(error):
        return f"refuses the token in {where}; take that of the cluster (`ray get-auth-token` on its head)"
    return (
        "asks for a token, and there is none here: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it into "
        "~/.ray/auth_token"
    )


def _check_reachable(address: str) -> None:
    """Fail within seconds where nobody answers, or an old Ray does; a refusal for want of a token is an answer."""
    if not address.startswith(("http://", "https://")):
        raise WorkloadError(f"the Jobs API has an address like http://HOST:8265, got {address!r}")
    try:
        with urllib.request.urlopen(
            f"{address.rstrip('/')}/api/version", timeout=_CONNECT_TIMEOUT_S
        ) as answer:
            body = answer.read(1 << 16)
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RunFailedError(
            f"no Ray Jobs API answers at {address} ({one_line(reason)}); start one with `ray start --head`, and "
            "give the address of its dashboard",
            bad_input=True,
        ) from error
    try:
        version = str(json.loads(body)["ray_version"])
    except (ValueError, KeyError, TypeError):
        return  # not what Ray answers; its client says so
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_RAY:
        oldest = ".".join(map(str, _OLDEST_RAY))
        raise RunFailedError(
            f"the cluster at {address} runs Ray {version}, and lowtide needs {oldest} or newer there; start the "
            "cluster with the Ray that is installed here",
            bad_input=True,
        )


def _known(client: Any, job_id: str) -> Any:
    info = _find(client, job_id)
    if info is None:
        raise RunFailedError(f"the cluster knows no job {job_id!r}; see `lowtide list`", bad_input=True)
    return info


def _find(client: Any, job_id: str) -> Any | None:
    """What the cluster knows of a job; None where it knows none of that name."""
    from ray.exceptions import AuthenticationError

    try:
        return client.get_job_info(job_id)
    except AuthenticationError as error:
        raise RunFailedError(f"the cluster {_token_fault(error)}", bad_input=True) from error
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise RunFailedError(f"the cluster cannot say how the job is: {_reason(error)}") from error


def _reason(error: object) -> str:
    """The last complaint of a traceback that the cluster has sent, or all of it on one line."""
    complaints = re.findall(r"^\w*(?:Error|Exception): .+", str(error), flags=re.MULTILINE)
    return one_line(complaints[-1] if complaints else error)
