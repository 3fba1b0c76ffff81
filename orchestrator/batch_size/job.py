"""`lowtide batch-size`: the noise scale in a minute, the sweep, or the branches of a run; and what follows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from orchestrator.backends.protocol import RunFailedError
from orchestrator.batch_size.branched import Branches, judge
from orchestrator.batch_size.command import BatchSizeRequest
from orchestrator.batch_size.critical_batch import CriticalBatch, fit_critical_batch
from orchestrator.batch_size.figure import branches_figure, sweep_figure
from orchestrator.batch_size.methods import Method
from orchestrator.batch_size.own_rate import own_rate
from orchestrator.batch_size.probe import ProbeRequest, Unanswered, probe
from orchestrator.batch_size.rate_rule import rate_rule
from orchestrator.batch_size.report import Said, branched_report, methods_of, probe_report
from orchestrator.batch_size.results_file import (
    BranchesFound,
    Found,
    Noise,
    ProbeFound,
    ResultsFile,
    SweepFound,
    SweepRun,
)
from orchestrator.batch_size.runs import Watch, base_request, run_branches, run_noise, run_sweep
from orchestrator.batch_size.short_run import RunFailure
from orchestrator.batch_size.sweep import Grid, outcomes
from orchestrator.batch_size.sweep_report import sweep_report
from orchestrator.checkpoint import CheckpointError, CheckpointStore, load_state, step_of
from orchestrator.data import load_datasets
from orchestrator.job import JobSpec
from orchestrator.phases import phase_at, phases_of
from orchestrator.planning import check_job
from planner.cli.answer import Answer
from planner.inputs.optimizers import OptimizerSpec
from planner.measure import threads
from planner.report.plots import saved
from planner.whole_file import write_whole

_PROBE_BATCHES = 8
_MOST_DOUBLINGS = 4
Answered = TypeVar("Answered")


def answer_batch_size(request: BatchSizeRequest) -> Answer:
    """Do what was asked; what is found is in the request's file as well.

    Raises:
        WorkloadError, CheckpointError: something of the job, the checkpoint or the file cannot be used.
        ValueError: the request does not fit the data.
        RunFailedError: a run could not be made.
    """
    file = ResultsFile(request.out, request.job)
    check_job(request.job)
    watch = Watch(request.quiet)
    with threads(request.job.train.threads_per_worker):
        if request.question == "probe":
            said = _probe(request, file)
        else:
            said = (
                _sweep(request, file, watch)
                if request.question == "sweep"
                else _branched(request, file, watch)
            )
    file.change(answer=said.payload)
    payload = {"results": str(request.out), **said.payload}
    lines = [*said.lines, f"results              {request.out}"]
    return Answer(said.status, payload, lines, said.complaint)


def job_at(job: JobSpec, step: int) -> JobSpec:
    """The job with the one optimizer that is at work after so many steps of a run."""
    phase = phase_at(phases_of(job), step)
    return job.model_copy(
        update={"optimizer": OptimizerSpec.model_validate({"name": phase.name, **phase.hyper})}
    )


def _probe(request: BatchSizeRequest, file: ResultsFile) -> Said:
    """The noise scale after some steps on one worker, or at a checkpoint, and what follows from it."""
    checkpoint = None if request.checkpoint is None else str(checkpoint_of(request.checkpoint))
    before = 0 if checkpoint is None else step_of(Path(checkpoint))
    if checkpoint is not None:
        request = replace(request, job=job_at(request.job, before))
    job = request.job
    rate = own_rate(job)
    task = base_request(
        request,
        job,
        batch=job.global_batch,
        rate=rate,
        seed=job.train.seed,
        limit=0,
        target_loss=None,
        checkpoint=checkpoint,
    )
    # The loss is there to be told, so a few batches of it do: the time is for the gradients.
    few = min(request.num_evaluated, _PROBE_BATCHES * job.global_batch)
    found = probe(ProbeRequest(replace(task, num_evaluated=few), before, request.time_limit_s))
    if isinstance(found, RunFailure):
        raise RunFailedError(found.message, bad_input=found.bad_input)
    if isinstance(found, Unanswered):
        return Said.failed(found.message)
    noise = Noise.of(found.point)
    file.change(probe=ProbeFound(batch=job.global_batch, rate=rate, noise=noise))
    return probe_report(request, found.noise, noise, rate=rate, others=_methods(request, file.found))


def _sweep(request: BatchSizeRequest, file: ResultsFile, watch: Watch) -> Said:
    job, earlier = request.job, file.found.sweep
    assert request.target_loss is not None
    num_samples = len(load_datasets(job.train.data)[0])
    section = SweepFound(target_loss=request.target_loss, num_evaluated=request.num_evaluated)
    if earlier is not None:
        if (earlier.target_loss, earlier.num_evaluated) != (section.target_loss, section.num_evaluated):
            raise ValueError(
                f"{file.path} holds a sweep to loss {earlier.target_loss:g} of {earlier.num_evaluated} samples, "
                f"asked is {section.target_loss:g} of {section.num_evaluated}. Name another file with --out."
            )
        watch.say(f"{len(earlier.runs)} runs are in {file.path} already")
    else:
        file.change(sweep=section)
    run_sweep(request, grid_of(request, num_samples), file, watch)
    runs = file.found.sweep.runs if file.found.sweep is not None else ()
    if not any(run.outcome == "reached" for run in runs):
        return Said.failed(_why_none(runs, request.target_loss))
    try:
        fit = fit_critical_batch(outcomes(runs, first_seed=job.train.seed))
    except ValueError as error:
        return Said.failed(str(error))
    run_noise(request, fit, file, watch)
    assert file.found.sweep is not None
    said = sweep_report(request, file.found.sweep, fit, others=_methods(request, file.found))
    if request.picture is not None:
        figure = sweep_figure(file.found.sweep, fit, first_seed=job.train.seed)
        write_whole(request.picture, saved(figure, request.picture.suffix[1:]))
    return said


def _why_none(runs: Sequence[SweepRun], target_loss: float) -> str:
    """Why no run reached the target, in a sentence."""
    if all(run.outcome == "diverged" for run in runs):
        return f"all {len(runs)} runs diverged. Give lower --rates."
    best = min((loss for run in runs for _, loss in run.curve), default=math.inf)
    return (
        f"none of {len(runs)} runs reached the target loss of {target_loss:g}; the lowest was {best:.4g}. "
        "Raise --target-loss or --max-steps."
    )


def grid_of(request: BatchSizeRequest, num_samples: int) -> Grid:
    """The grid that is asked for; without batch sizes, powers of two around the job's.

    Raises:
        ValueError: fewer than three batch sizes, or one larger than the training set.
    """
    job = request.job
    own, ends = job.global_batch, range(-_MOST_DOUBLINGS, _MOST_DOUBLINGS + 1)
    around = {int(own * 2.0**power) for power in ends if 1 <= own * 2.0**power <= num_samples}
    batches = request.batches or tuple(sorted(around))
    if max(batches, default=0) > num_samples:
        raise ValueError(
            f"--batches has {max(batches)}, more than the {num_samples} samples of the training set. Leave it out."
        )
    return Grid(
        batches=batches,
        own_batch=own,
        own_rate=own_rate(job),
        rule=rate_rule(job.optimizer.name),
        rates=request.rates,
        seeds=request.seeds,
        max_steps=request.max_steps,
    )


def _branched(request: BatchSizeRequest, file: ResultsFile, watch: Watch) -> Said:
    earlier = file.found.branched
    assert request.checkpoint is not None
    chosen = checkpoint_of(request.checkpoint)
    request = replace(request, job=job_at(request.job, step_of(chosen)))
    job = request.job
    state = load_state(chosen)
    rate = float(state["optimizer"]["param_groups"][0]["lr"])
    if not rate > 0:
        raise CheckpointError(
            f"the schedule has ended at checkpoint {chosen}: its rate is {rate:g}, so nothing moves. Name an "
            "earlier one, such as RUN_DIR/checkpoints/step-00000100; train.checkpoint_every and "
            "keep_checkpoints keep some."
        )
    section = BranchesFound(
        checkpoint=(chosen / "sha256").read_text(encoding="ascii"),
        step=step_of(chosen),
        batch=job.global_batch,
        window=request.window,
        num_evaluated=request.num_evaluated,
    )
    if earlier is not None and earlier.model_copy(update={"runs": ()}) != section:
        raise ValueError(
            f"{file.path} holds branches of another checkpoint or window (step {earlier.step}, {earlier.window} "
            "steps). Name another file with --out."
        )
    if earlier is None:
        file.change(branched=section)
    run_branches(request, file, watch, checkpoint=str(chosen.resolve()), rate=rate)
    assert file.found.branched is not None
    try:
        branches: Branches = judge(file.found.branched.runs)
    except ValueError as error:
        return Said.failed(str(error))
    if request.picture is not None:
        figure = branches_figure(branches, batch=job.global_batch)
        write_whole(request.picture, saved(figure, request.picture.suffix[1:]))
    return branched_report(
        request, file.found.branched, branches, others=_methods(request, file.found), rate=rate
    )


def checkpoint_of(path: Path) -> Path:
    """A checkpoint's folder, or the newest whole one of a run's.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "state.pt").is_file():
        load_state(path)
        return path
    for found in reversed(CheckpointStore(path / "checkpoints", keep=1).paths()):
        try:
            load_state(found)
        except CheckpointError:
            continue
        return found
    raise CheckpointError(
        f"--checkpoint {path}: there is no whole checkpoint in it. Name the folder of a run that has written one."
    )


def _methods(request: BatchSizeRequest, found: Found) -> list[Method]:
    """What all methods that have an answer in the file say of the critical batch."""
    fit: CriticalBatch | None = None
    branches: Branches | None = None
    if found.sweep is not None:
        fit = _or_none(
            functools.partial(
                fit_critical_batch, outcomes(found.sweep.runs, first_seed=request.job.train.seed)
            )
        )
    if found.branched is not None:
        branches = _or_none(functools.partial(judge, found.branched.runs))
    return methods_of(found, fit, branches, job=request.job)


def _or_none(make: Callable[[], Answered]) -> Answered | None:
    """The answer, None where there is none yet."""
    try:
        return make()
    except ValueError:
        return None
