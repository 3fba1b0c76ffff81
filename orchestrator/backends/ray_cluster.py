"""Ray Train's workers: the same training on a Ray cluster, with its placement and failure handling."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.backends.protocol import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.ray_access import last_complaint, stderr_aside, use_token
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome, RankError, train_rank

_POLL_S = 0.1
_OBJECT_STORE_BYTES = 256 << 20
# Ray Train's own memory of a run. Our verified store decides which checkpoint a run continues from instead.
_RAY_FILES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Ray reads these when it is imported or started; none changes what is computed.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # file targets are relative to the job's folder
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # the raylet's own complaints would be printed on stdout, among our results
}
# Torch reads these when a worker imports it.
_QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class _Mailbox:
    """The actor between the ranks and the driver: events one way, the request to stop the other."""

    def __init__(self) -> None:
        self._letters: list[Any] = []
        self._stop = False

    def put(self, letter: Any) -> bool:
        """Leave a letter for the driver; the answer is whether to stop."""
        self._letters.append(letter)
        return self._stop

    def take(self) -> list[Any]:
        """All letters since the last call."""
        letters, self._letters = self._letters, []
        return letters

    def stop(self) -> None:
        """Ask the ranks to stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether the ranks are asked to stop."""
        return self._stop


class _RayReporter:
    """Reports through the mailbox without waiting for it."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._answer: Any = None
        self._stop = False

    def emit(self, event: Event) -> None:
        self._mailbox.put.remote(event)

    def stop_requested(self) -> bool:
        """The newest answer that has arrived; a question is always on its way."""
        import ray

        if self._answer is None:
            self._answer = self._mailbox.stop_requested.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            self._stop = self._stop or bool(ray.get(self._answer))
            self._answer = None
        return self._stop

    def checkpoint_saved(self, path: Path | None, *, step: int) -> None:
        """Let Ray Train know the checkpoint; it lies in the run's storage already, so nothing is copied."""
        from ray.train import Checkpoint, CheckpointUploadMode, report

        checkpoint = None if path is None else Checkpoint.from_directory(str(path))
        report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def run(
    assignment: Assignment,
    job: JobSpec,
    *,
    on_event: Callable[[Event], None],
    stop: StopSignal,
    address: str | None,
) -> Outcome:
    """Run all ranks as Ray Train workers.

    Args:
        assignment: what each rank is given.
        job: the same job, read.
        on_event: called in this process with what the ranks report.
        stop: the user's request to stop.
        address: of a running cluster; None starts one on this machine for the time of the run.

    Raises:
        RunFailedError: the cluster cannot be reached, or training failed more often than the job allows.
    """
    with connected(address, job) as ray:
        if address is not None:  # the job's folder is the workers' working directory, wherever they run
            assignment = replace(assignment, folder=".")

        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        fit = _Fit(assignment, job, mailbox)
        try:
            with stop:
                return _follow(fit, mailbox, on_event=on_event, stop=stop)
        finally:
            for name in _RAY_FILES:
                Path(assignment.run_dir, name).unlink(missing_ok=True)


def _follow(fit: _Fit, mailbox: Any, *, on_event: Callable[[Event], None], stop: StopSignal) -> Outcome:
    """Pass events on until training has ended; what no new attempt can mend ends it at once."""
    import ray

    fit.thread.start()
    outcome: Outcome | None = None
    complaints: list[tuple[str, int]] = []
    last_step = 0
    asked = False
    while True:
        if stop.requested and not asked:
            mailbox.stop.remote()
            asked = True
        ended = not fit.thread.is_alive()
        for letter in ray.get(mailbox.take.remote()):
            if isinstance(letter, Outcome):
                outcome = letter
            elif isinstance(letter, RankError):
                complaint = (str(letter), last_step)
                if (
                    letter.bad_input or complaint in complaints
                ):  # the same at the same step: trying again is in vain
                    raise RunFailedError(str(letter), bad_input=letter.bad_input)
                complaints.append(complaint)
            else:
                last_step = letter["step"] if letter["event"] == "step" else last_step
                on_event(letter)
        if ended:
            if fit.error is not None:
                reason = complaints[-1][0] if complaints else _first_line(fit.error)
                raise RunFailedError(f"training failed on the Ray workers: {reason}") from fit.error
            assert outcome is not None  # rank 0 leaves it before it returns
            return outcome
        time.sleep(_POLL_S)


class _Fit:
    """Ray Train's blocking `fit` in a thread, so that Ctrl-C stays ours."""

    def __init__(self, assignment: Assignment, job: JobSpec, mailbox: Any) -> None:
        self.error: Exception | None = None
        self._trainer = _make_trainer(assignment, job, mailbox)
        self.thread = threading.Thread(target=self._run, daemon=True, name="ray-train-fit")

    def _run(self) -> None:
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError

        try:
            self._trainer.fit()
        except (TrainingFailedError, RayError, RuntimeError) as error:
            self.error = error


def _make_trainer(assignment: Assignment, job: JobSpec, mailbox: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    run_dir = Path(assignment.run_dir)
    for name in _RAY_FILES:
        (run_dir / name).unlink(missing_ok=True)
    train = job.train
    return TorchTrainer(
        _rank,
        train_loop_config={"assignment": assignment, "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.device == "cuda",
            resources_per_worker={"CPU": 1, **({"GPU": 1} if train.device == "cuda" else {})},
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def _rank(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    mailbox = config["mailbox"]
    try:
        outcome = train_rank(
            config["assignment"],
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device_index=get_device().index or 0,
            reporter=_RayReporter(mailbox),
        )
    except RankError as error:
        ray.get(mailbox.put.remote(error))
        raise
    if context.get_world_rank() == 0:
        ray.get(mailbox.put.remote(outcome))


@contextlib.contextmanager
def connected(address: str | None, job: JobSpec) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine; leave it, or end it, at the end; gives `ray`."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is not None:
        use_token()
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RunFailedError(
            "Ray is not installed; install it with pip install 'ray[default,train]', or set train.backend "
            "to 'local'",
            bad_input=True,
        ) from error

    logging.getLogger("ray").setLevel(logging.ERROR)
    threads = str(job.train.threads_per_worker)
    arguments: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": False,
        "runtime_env": {"env_vars": {**_QUIET, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
    }
    if address is None:
        cpus = max(os.cpu_count() or 1, job.train.workers)
        arguments |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        arguments["address"] = address
        if _JOB_VARIABLE not in os.environ:  # a submitted job has brought its folder along
            arguments["runtime_env"] |= {"working_dir": str(job.model.folder), "excludes": ["runs/", ".git/"]}
    with stderr_aside() as messages:
        try:
            ray.init(**arguments)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            place = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
            reason = last_complaint(messages) or _first_line(error)
            raise RunFailedError(f"{place} cannot be used: {reason}", bad_input=True) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
