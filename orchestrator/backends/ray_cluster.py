"""Ray Train's workers: the same training on a Ray cluster, with its placement and failure handling."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.backends.attempt import Attempts
from orchestrator.backends.protocol import Replan, RunFailedError
from orchestrator.backends.ray_connection import connected, folder_on_workers, use_environment
from orchestrator.backends.ray_mailbox import (
    GroupEnded,
    Mailbox,
    RayReporter,
    SizeWanted,
    group_watch,
    next_assignment,
)
from orchestrator.backends.room import check_room, check_room_is_left, resources_per_worker
from orchestrator.failures import Cause
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.rank_errors import RankError
from orchestrator.ray_access import dashboard_of
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome, train_rank

_POLL_S = 0.25  # the ranks need the processors
_GRACE_S = 1.0
_SILENCE_S = 15.0
# How often Ray looks whether it has room for more workers.
_RESIZE_EVERY_S = 10.0
# Ray Train's own memory of a run. Our verified store decides which checkpoint a run continues from instead.
_RAY_FILES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")


def run(
    assignment: Assignment,
    job: JobSpec,
    *,
    on_event: Callable[[Event], None],
    stop: StopSignal,
    replan: Replan | None = None,
    address: str | None,
) -> Outcome:
    """Run all ranks as Ray Train workers.

    Args:
        assignment: what each rank is given.
        job: the same job, read.
        on_event: called in this process with what the ranks report.
        stop: the user's request to stop.
        replan: see `Backend`.
        address: of a running cluster; None starts one on this machine for the time of the run.

    Raises:
        RunFailedError: the cluster cannot be reached, or training failed more often than the job allows.
    """
    with connected(address, job) as ray:
        from ray.train import ScalingConfig
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assignment = replace(assignment, folder=folder_on_workers(job, address))
        waits = check_room(ray, job, address=address)
        if waits:
            on_event({"event": "warning", "step": 0, "message": waits})

        dashboard = dashboard_of(ray)
        if dashboard:
            on_event({"event": "note", "step": 0, "message": f"Ray dashboard {dashboard}"})
        # Where this process is: the loss of another node must not take the events along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        beside = {"num_cpus": 0, "scheduling_strategy": here}
        mailbox = ray.remote(Mailbox).options(**beside).remote(assignment)
        attempts = Attempts(assignment, job, on_event, stop, replan)
        look = functools.partial(check_room_is_left, ray, job, address=address)
        run_dir = Path(assignment.run_dir).absolute()
        _remove_ray_files(run_dir)
        # Not a thread of this process: one that still waits for Ray when we leave it would end the process.
        task = ray.remote(_fit).options(**beside, max_retries=0)
        fit = task.remote(job, str(run_dir), _number_of_workers(ray.__version__, ScalingConfig, job), mailbox)
        try:
            with stop:
                return _follow(fit, mailbox, attempts, look=look)
        finally:
            ray.cancel(fit, force=True)
            _remove_ray_files(run_dir)


def _follow(fit: Any, mailbox: Any, attempts: Attempts, *, look: Callable[[], None]) -> Outcome:
    """Pass events on until training has ended; each attempt is Ray's, once it is decided on.

    Args:
        fit: the task that ends with the training.
        mailbox: where the ranks leave events.
        attempts: told of each.
        look: raises where the cluster can no longer run it; called when nothing was heard for a while.
    """
    import ray
    from ray.exceptions import RayError

    outcome: Outcome | None = None
    errors: dict[int, RankError] = {}
    asked = False
    heard_s = time.monotonic()
    while True:
        if attempts.stop.requested and not asked:
            mailbox.stop.remote()
            asked = True
        has_ended = bool(ray.wait([fit], timeout=0)[0])
        letters = ray.get(mailbox.take.remote())
        if letters:
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s > _SILENCE_S:
            look()
            heard_s = time.monotonic()
        for letter in letters:
            if isinstance(letter, Outcome):
                outcome = letter
            elif isinstance(letter, RankError):
                errors[letter.rank] = letter
            elif isinstance(letter, GroupEnded):
                attempts.answer(letter.failure(errors, attempts.job))
                errors = {}
                ray.get(mailbox.assign.remote(attempts.assignment))
            elif isinstance(letter, SizeWanted):
                if letter.workers != attempts.job.train.workers:
                    attempts.resize(letter.workers)
                    ray.get(mailbox.assign.remote(attempts.assignment))
            else:
                attempts.take(letter)
        if has_ended:
            try:
                ray.get(fit)
            except RayError as error:
                cause = (
                    getattr(error, "cause", None) or error
                )  # a RayTaskError's own text is the whole traceback
                raise RunFailedError(f"training failed on the Ray workers: {_first_line(cause)}") from error
            assert outcome is not None  # rank 0 leaves it before it returns
            return outcome
        time.sleep(_POLL_S)


def _fit(job: JobSpec, run_dir: str, number_of_workers: dict[str, Any], mailbox: Any) -> None:
    """Ray Train's blocking `fit`, as a task.

    Args:
        job: what to do.
        run_dir: the run's folder, absolute.
        number_of_workers: as Ray Train takes it.
        mailbox: of the ranks and the driver.
    """
    use_environment()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = job.train
    TorchTrainer(
        _rank,
        train_loop_config={"mailbox": mailbox},
        torch_config=TorchConfig(timeout_s=math.ceil(train.collective_timeout_s)),
        scaling_config=ScalingConfig(
            **number_of_workers,
            use_gpu=train.device == "cuda",
            resources_per_worker=resources_per_worker(job),
        ),
        run_config=RunConfig(
            name=Path(run_dir).name,
            storage_path=str(Path(run_dir).parent),
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=[group_watch(ray, mailbox)],
        ),
    ).fit()


def _remove_ray_files(run_dir: Path) -> None:
    for name in _RAY_FILES:
        (run_dir / name).unlink(missing_ok=True)


def _number_of_workers(version: str, scaling_config: Any, job: JobSpec) -> dict[str, Any]:
    """As Ray Train takes it: a number, or a range and how often to look whether there is room for more."""
    sizes = job.train.elastic
    if sizes is None:
        return {"num_workers": job.train.workers}
    if "elastic_resize_monitor_interval_s" not in inspect.signature(scaling_config).parameters:
        raise RunFailedError(
            f"Ray {version} starts a fixed number of workers; install a newer one, or set train.workers to one",
            bad_input=True,
        )
    return {"num_workers": (sizes.min, sizes.max), "elastic_resize_monitor_interval_s": _RESIZE_EVERY_S}


def _rank(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    mailbox = config["mailbox"]
    assignment = next_assignment(ray, mailbox, workers=context.get_world_size())
    try:
        outcome = train_rank(
            assignment,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device_index=get_device().index or 0,
            reporter=RayReporter(ray, mailbox, assignment.run_dir),
        )
    except RankError as error:
        ray.get(mailbox.put.remote(error))
        if error.cause in (Cause.HANG, Cause.LOST_PEER):
            time.sleep(_GRACE_S)  # so that Ray sees how the other rank has ended, and the others are heard
        raise
    if context.get_world_rank() == 0:
        ray.get(mailbox.put.remote(outcome))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
