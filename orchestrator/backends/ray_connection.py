"""Connecting this process to a Ray cluster, or to one of its own on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from orchestrator.backends.protocol import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.ray_access import explain_refusal, stderr_aside, use_token

_OBJECT_STORE_BYTES = 256 << 20
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Ray reads these when it is imported or started; none changes what is computed.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # file targets are relative to the job's folder
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",  # a rank that hangs does not answer
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # the raylet's own complaints would be printed on stdout, among our results
}
# Torch reads these when a worker imports it.
_QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def use_environment() -> None:
    """Set what Ray reads from the environment of this process, unless the user has."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def connected(address: str | None, job: JobSpec) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine; leave it, or end it, at the end; gives `ray`.

    Within a block that is connected already this does nothing.

    Raises:
        RunFailedError: the cluster cannot be reached, or does not let this process join.
    """
    use_environment()
    if address is not None:
        use_token(to_join=True)
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise RunFailedError(
            "Ray is not installed; install it with pip install 'ray[default,train]', or set train.backend "
            "to 'local'",
            bad_input=True,
        ) from error

    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    threads = str(job.train.threads_per_worker)
    arguments: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": False,
        "runtime_env": {"env_vars": {**_QUIET, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
    }
    if address is None:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # there is no other node
        cpus = max(os.cpu_count() or 1, job.train.workers)
        arguments |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "address": "local",  # even where a cluster of somebody else runs on this machine
        }
    else:
        arguments["address"] = address
        submitted = _submitted_environment()
        if not submitted.keys() & {"working_dir", "image_uri"}:  # else it has brought its folder along
            arguments["runtime_env"] |= {"working_dir": str(job.model.folder), "excludes": ["runs/", ".git/"]}
        # Ray refuses a variable that the submitted job has set itself.
        for name in submitted.get("env_vars", {}):
            arguments["runtime_env"]["env_vars"].pop(name, None)
    with stderr_aside() as messages:
        try:
            with _own_group() if address is None else contextlib.nullcontext():
                ray.init(**arguments)
        except Exception as error:
            # Where its own processes do not start, Ray raises Exception itself; mistakes of ours have a class.
            expected = (OSError, RuntimeError, ValueError, RayError)
            if type(error) is not Exception and not isinstance(error, expected):
                raise
            place = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
            reason = explain_refusal(error, messages)
            raise RunFailedError(f"{place} cannot be used: {reason}", bad_input=True) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_group() -> Iterator[None]:
    """Have the processes that are started in the block in a process group of their own.

    A signal to the whole group of the command then reaches this process alone, which asks the ranks to stop. The
    leader of a session cannot leave its group; Ray then gets the signal as well.
    """
    group = os.getpgrp()
    if os.getsid(0) == os.getpid():
        yield
        return
    leader = subprocess.Popen(["sleep", "600"], process_group=0)  # a group needs somebody whose number it has
    os.setpgid(0, leader.pid)
    try:
        yield
    finally:
        os.setpgid(0, group)
        leader.kill()
        leader.wait()


def node_id() -> str:
    """The cluster's name for the node that this process is on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def folder_on_workers(job: JobSpec, address: str | None) -> str:
    """The job's folder where a cluster's processes see it: their working directory, but in an image the same."""
    travels = address is not None and "image_uri" not in _submitted_environment()
    return "." if travels else str(job.model.folder)


def _submitted_environment() -> dict[str, Any]:
    """The runtime environment of the submitted job that this process is the command of; {} where it is of none."""
    text = os.environ.get(_JOB_VARIABLE)
    return (json.loads(text).get("runtime_env") or {}) if text else {}
