"""From a job to a finished run folder: plan, start the ranks, follow them, sum up."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.backends import local, ray_cluster
from orchestrator.backends.protocol import Backend, RunFailedError
from orchestrator.block_planning import is_planned_blockwise, plan_job_blocks
from orchestrator.job import JobSpec
from orchestrator.metrics import Event, MetricsLog
from orchestrator.planning import check_job, plan_job
from orchestrator.plots import loss_figure
from orchestrator.progress import Display, write_line
from orchestrator.ray_access import check_reachable
from orchestrator.run_folder import RunFolder
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome
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
    json_lines: bool
    last_step: Event | None = field(default=None)

    def __call__(self, event: Event) -> None:
        self.log.append(event)
        if event["event"] == "step":
            self.last_step = event
            if self.json_lines:
                write_line(json.dumps(event))
        self.display.show(event)


def train(job: JobSpec, options: Options) -> bool:
    """Train a job; results on stdout, progress on stderr, everything in the run's folder.

    Returns:
        Whether training reached its last step; False where the user stopped it.

    Raises:
        WorkloadError, planner.InfeasibleError, RunFailedError: see there.
    """
    backend = _backend(job, options)
    check_job(job)
    earlier = RunFolder.reopen(options.resume, job) if options.resume else None
    with Display(job.train.steps, quiet=options.quiet or options.json_lines) as display:
        plan = _plan(job, earlier, display)
        if plan is not None and not options.json_lines:
            for line in plan.lines() if isinstance(plan, BlockwisePlan) else plan_lines(plan):
                write_line(line)
        folder = earlier or RunFolder.create(Path(job.train.run_dir), job.name)
        if plan is not None:
            plan.save(folder.plan)
        display.say(f"run folder {folder.path}")
        outcome, follower = _run(job, options, backend, folder, plan, display)
    summary = _summary(outcome, follower, job, folder)
    status = "finished" if outcome.finished else "stopped"
    folder.write_record(job, options.overrides, status=status, result=summary)
    _draw(folder, follower, plan)
    _print_summary(summary, options, _hint(options, folder), finished=outcome.finished)
    return outcome.finished


def _plan(job: JobSpec, earlier: RunFolder | None, display: Display) -> Plan | BlockwisePlan | None:
    """A new plan, or the one that a continued run began with; None for budget "none"."""
    if job.budget == "none":
        return None
    blockwise = is_planned_blockwise(job)
    if earlier is not None and earlier.was_planned_as(job):
        return BlockwisePlan.load(earlier.plan) if blockwise else Plan.load(earlier.plan)
    display.say(f"planning for {job.hardware}, at most {job.solver.time_limit} of solving")
    return plan_job_blocks(job) if blockwise else plan_job(job)


def _run(
    job: JobSpec,
    options: Options,
    backend: Backend,
    folder: RunFolder,
    plan: Plan | BlockwisePlan | None,
    display: Display,
) -> tuple[Outcome, _Follower]:
    """Start the ranks and follow them to their end; what goes wrong is in run.json too."""
    record = functools.partial(folder.write_record, job, options.overrides)
    hint = _hint(options, folder)
    stop = StopSignal(
        lambda: display.warn(f"stopping after this step; Ctrl-C again ends at once. Continue with: {hint}")
    )
    follower = _Follower(MetricsLog(folder.metrics), display, options.json_lines)
    assignment = Assignment(
        job=job.to_data(),
        folder=str(job.model.folder),
        run_dir=str(folder.path),
        plan=plan.to_json() if isinstance(plan, Plan) else None,
        block_plans=plan.of_blocks() if isinstance(plan, BlockwisePlan) else {},
        block_promise=(plan.predicted_peak_bytes, plan.budget_bytes)
        if isinstance(plan, BlockwisePlan)
        else None,
    )
    record(status="running")
    display.say(
        f"starting {job.train.workers} {'worker' if job.train.workers == 1 else 'workers'}, {job.train.backend}"
    )
    try:
        return backend(assignment, job, on_event=follower, stop=stop), follower
    except RunFailedError as error:
        record(status="failed", error=str(error))
        if folder.checkpoints.is_dir() and not error.bad_input:
            raise RunFailedError(f"{error}. Continue with: {hint}") from error
        raise
    except KeyboardInterrupt:
        record(status="interrupted")
        raise


def _hint(options: Options, folder: RunFolder) -> str:
    return f"lowtide train {options.job_path} --resume {folder.path}"


def _backend(job: JobSpec, options: Options) -> Backend:
    if job.train.backend == "local":
        if options.address is not None:
            raise RunFailedError(
                "--address needs train.backend 'ray', got 'local'; use --backend ray", bad_input=True
            )
        return local.run
    if options.address is not None:
        check_reachable(options.address)
    return functools.partial(ray_cluster.run, address=options.address)


def _summary(outcome: Outcome, follower: _Follower, job: JobSpec, folder: RunFolder) -> dict[str, Any]:
    """The run's last object: the numbers of its last step and what came of it."""
    last = follower.last_step or {}
    keys = ("loss", "measured_peak_bytes", "predicted_peak_bytes", "noise_scale", "noise_scale_interval")
    return {
        "event": "end",
        "step": outcome.step,
        **{key: last.get(key) for key in keys},
        "noise_scale_reliable": last.get("noise_scale_reliable", False),
        "noise_scale_reason": last.get("noise_scale_reason", ""),
        "global_batch": job.global_batch,
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
    before, after = summary["validation_before"], summary["validation_after"]
    if before is not None and after is not None:
        write_line(
            f"validation loss       {before:.4f} before, {after:.4f} after step {summary['validated_step']}"
        )
    write_line(f"recommended batch     {_recommendation(summary)}")
    write_line(f"run folder            {summary['run_dir']}")
    if not finished:
        write_line(f"stopped at step {summary['step']}; continue with: {hint}")


def _recommendation(summary: dict[str, Any]) -> str:
    if summary["recommended_batch"] is None:
        return f"none: {summary['recommended_because']}"
    batches = f"{summary['recommended_batch']} samples a step, now {summary['global_batch']}"
    return f"{batches}: {summary['recommended_because']}"
