"""From a job to a finished run folder: plan, start the ranks, follow them, sum up."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.backends import local, ray_cluster, ray_connection
from orchestrator.backends.protocol import Backend, RunFailedError
from orchestrator.backends.room import check_room
from orchestrator.batch_size.starting import started
from orchestrator.job import JobSpec
from orchestrator.metrics import Event, MetricsLog
from orchestrator.mlflow_run import MlflowRun
from orchestrator.planning import check_job
from orchestrator.plots import loss_figure
from orchestrator.progress import Display, write_line
from orchestrator.ray_access import check_reachable
from orchestrator.run import Run, plan_of
from orchestrator.run_folder import RunFolder
from orchestrator.stopping import StopSignal
from orchestrator.summary import summary_lines
from orchestrator.tensorboard_files import TensorboardFiles
from orchestrator.watching import Watcher, Watchers
from orchestrator.worker import Outcome
from planner import Plan
from planner.blockwise.plans import BlockwisePlan
from planner.report.plots import memory_figure
from planner.report.summary import plan_lines


@dataclass(frozen=True)
class Options:
    """How a run is started and shown.

    Attributes:
        address: of a running Ray cluster; None starts one where the job asks for Ray.
        resume: folder of the run to continue; None starts a new one.
        json_lines: one JSON object a step and one at the end on stdout, instead of words.
        quiet: no progress on stderr.
        job_path: as the user wrote it, to say how to continue.
        overrides: settings that the command line gave, which a continued run takes over.
    """

    job_path: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    resume: Path | None = None
    json_lines: bool = False
    quiet: bool = False


@dataclass
class _Follower:
    """Writes, prints and shows what the ranks report; remembers the last step."""

    log: MetricsLog
    display: Display
    watchers: Watchers
    json_lines: bool
    last_step: Event | None = field(default=None)

    def __call__(self, event: Event) -> None:
        self.log.append(event)
        if event["event"] == "step":
            self.last_step = event
            if self.json_lines:
                write_line(json.dumps(event))
        self.display.show(event)
        self.watchers(event)


def train(job: JobSpec, options: Options) -> int:
    """Train a job; results on stdout, progress on stderr, everything in the run's folder.

    Returns:
        The exit status: 0 where training reached its last step, 130 or 143 where Ctrl-C or SIGTERM stopped it.

    Raises:
        WorkloadError, planner.InfeasibleError, RunFailedError: see there.
    """
    with _backend(job, options) as backend:
        return _train(job, options, backend)


def _train(job: JobSpec, options: Options, backend: Backend) -> int:
    """The same, on ranks that this backend starts."""
    check_job(job)
    asked = job
    earlier = RunFolder.reopen(options.resume, job) if options.resume else None
    quiet = options.quiet or options.json_lines
    with Display(job.train.steps, base_batch=job.base_batch, quiet=quiet) as display:
        job = (
            started(job, address=options.address, say=display.say)
            if earlier is None
            else earlier.continued(job)
        )
        plan, machine = plan_of(job, earlier, display, address=options.address)
        if plan is not None and not options.json_lines:
            for line in plan.lines() if isinstance(plan, BlockwisePlan) else plan_lines(plan):
                write_line(line)
        folder = earlier or RunFolder.create(Path(job.train.run_dir), job.name)
        if plan is not None:
            plan.save(folder.plan)
        display.say(f"run folder {folder.path}")
        record = functools.partial(
            folder.write_record, asked, options.overrides, running=job, planned_on=machine
        )
        hint = _hint(options, folder)
        stop = StopSignal(
            lambda: display.warn(
                f"stopping after this step; a second signal ends at once. Continue with: {hint}"
            )
        )
        watchers = Watchers(_watchers(job, folder), display.warn)
        follower = _Follower(MetricsLog(folder.metrics), display, watchers, options.json_lines)
        run = Run(
            job=job,
            folder=folder,
            backend=backend,
            on_event=follower,
            log=follower.log,
            stop=stop,
            display=display,
            record=record,
            plan=plan,
            address=options.address,
        )
        with watchers:
            outcome = run.to_the_end(hint)
    summary = _summary(outcome, follower, job, folder)
    status = "finished" if outcome.finished else "stopped"
    run.record(status=status, result=summary)
    _draw(folder, follower, run.plan)
    _print_summary(summary, options, hint, finished=outcome.finished)
    return 0 if outcome.finished else stop.exit_status


def _watchers(job: JobSpec, folder: RunFolder) -> dict[str, Callable[[], Watcher]]:
    """Who is told of a run beside its own folder's files."""
    found: dict[str, Callable[[], Watcher]] = {"TensorBoard": lambda: TensorboardFiles(folder.tensorboard)}
    place = job.train.mlflow
    if place is not None:
        name, settings = folder.path.name, job.to_data()
        found["MLflow"] = lambda: MlflowRun(place, name=name, settings=settings, memory=folder.mlflow_run)
    return found


def _hint(options: Options, folder: RunFolder) -> str:
    return f"lowtide train {options.job_path} --resume {folder.path}"


@contextlib.contextmanager
def _backend(job: JobSpec, options: Options) -> Iterator[Backend]:
    """What runs the ranks; a cluster is joined first, so that nothing is made for one that has no room."""
    if job.train.backend == "local":
        if options.address is not None:
            raise RunFailedError(
                "--address needs train.backend 'ray', got 'local'; use --backend ray", bad_input=True
            )
        yield local.run
        return
    run = functools.partial(ray_cluster.run, address=options.address)
    if options.address is None:
        yield run
        return
    check_reachable(options.address)
    with ray_connection.connected(options.address, job) as ray:
        check_room(ray, job, address=options.address)
        yield run


def _summary(outcome: Outcome, follower: _Follower, job: JobSpec, folder: RunFolder) -> dict[str, Any]:
    """The run's last object: the numbers of its last step and what came of it."""
    last = follower.last_step or {}
    keys = ("loss", "measured_peak_bytes", "predicted_peak_bytes", "noise_scale", "noise_scale_interval")
    return {
        "event": "end",
        "step": outcome.step,
        **{key: last.get(key) for key in keys},
        "measured_peak_bytes_by_rank": last.get("measured_peak_bytes_by_rank", []),
        "noise_scale_reliable": last.get("noise_scale_reliable", False),
        "noise_scale_reason": last.get("noise_scale_reason", ""),
        "global_batch": last.get("global_batch", job.global_batch),
        "recommended_batch": outcome.recommended_batch,
        "recommended_because": outcome.recommended_because,
        "validation_before": outcome.validation_before,
        "validation_after": outcome.validation_after,
        "validated_step": outcome.validated_step,
        "finished": outcome.finished,
        "run_dir": str(folder.path),
    }


def _draw(folder: RunFolder, follower: _Follower, plan: Plan | BlockwisePlan | None) -> None:
    """The figures of a run; that of the memory needs a plan."""
    events = follower.log.read()
    loss_figure(events).savefig(folder.loss_figure, dpi=150)
    if isinstance(plan, Plan):
        peaks = [event["measured_peak_bytes"] for event in events if event["event"] == "step"]
        measured = max((peak for peak in peaks if peak is not None), default=None)
        memory_figure(plan, measured_peak_bytes=measured).savefig(folder.memory_figure, dpi=150)


def _print_summary(summary: dict[str, Any], options: Options, hint: str, *, finished: bool) -> None:
    if options.json_lines:
        write_line(json.dumps(summary))
        return
    for line in summary_lines(summary):
        write_line(line)
    if not finished:
        write_line(f"stopped at step {summary['step']}; continue with: {hint}")
