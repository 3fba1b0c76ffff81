"""The runs of a sweep and of branched training: started side by side, kept one by one, shown as they end."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator.backends.local_tasks import local_tasks
from orchestrator.backends.protocol import RunFailedError
from orchestrator.backends.ray_connection import folder_on_workers
from orchestrator.backends.ray_tasks import ray_tasks
from orchestrator.backends.tasks import TaskPool
from orchestrator.batch_size.branched import next_branch
from orchestrator.batch_size.command import BatchSizeRequest
from orchestrator.batch_size.critical_batch import CriticalBatch
from orchestrator.batch_size.rate_rule import rate_factor_of, rate_rule
from orchestrator.batch_size.results_file import BranchesFound, BranchRun, Noise, ResultsFile, SweepRun
from orchestrator.batch_size.short_run import RunFailure, RunRequest, RunResult, run_short
from orchestrator.batch_size.sweep import Cell, Grid, Sweep, best_run
from orchestrator.job import JobSpec
from orchestrator.ray_access import check_reachable

# Examples spent on one measurement of the noise along a run: about as many as the target needs, within these.
_NOISE_EXAMPLES = (1024, 65536)


@dataclass
class Watch:
    """What a person sees of the runs, on stderr: a bar on a terminal, a line a run elsewhere."""

    quiet: bool
    done: int = 0
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def __post_init__(self) -> None:
        columns = (
            TextColumn("runs"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[last]}"),
            TimeRemainingColumn(compact=True),
        )
        hidden = self.quiet or not self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self.task = self.bar.add_task("runs", total=None, last="")

    def say(self, text: str) -> None:
        """A line."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def ended(self, text: str, *, total: int) -> None:
        """A run has ended; `total` are expected."""
        self.done += 1
        self.bar.update(self.task, completed=self.done, total=max(total, self.done), last=text)
        if self.bar.disable:
            self.say(f"run {self.done} of about {max(total, self.done)}: {text}")


@contextmanager
def pool_of(request: BatchSizeRequest) -> Iterator[TaskPool]:
    """Where the runs of a request run: as its job's backend says."""
    job = request.job
    pool: AbstractContextManager[TaskPool]
    if job.train.backend == "local":
        cores = max(1, (os.cpu_count() or 1) // job.train.threads_per_worker)
        if job.train.device == "cuda":  # all processes of this machine would share its first device
            cores = 1
        pool = local_tasks(run_short, num_slots=request.parallel or cores)
    else:
        if request.address is not None:
            check_reachable(request.address)
        pool = ray_tasks(run_short, job, num_slots=request.parallel, address=request.address)
    with pool as slots:
        yield slots


def _work_off(
    pool: TaskPool, next_task: Callable[[], RunRequest | None], ended: Callable[[RunRequest, RunResult], None]
) -> None:
    """Start what comes next while there is a free slot, and hand on what ends, until nothing runs.

    Raises:
        RunFailedError: a run could not be made, or its worker was lost.
    """
    running = 0
    while True:
        while running < pool.num_slots and (task := next_task()) is not None:
            pool.submit(task)
            running += 1
        if not running:
            return
        task, result = pool.next_result()
        running -= 1
        if isinstance(result, RunFailure):
            raise RunFailedError(result.message, bad_input=result.bad_input)
        ended(task, result)


def base_request(request: BatchSizeRequest, job: JobSpec, **changes: Any) -> RunRequest:
    """A run of the job; on a cluster its folder is the workers' own."""
    folder = folder_on_workers(job, None if request.question == "probe" else request.address)
    return RunRequest(job=job.to_data(), folder=folder, num_evaluated=request.num_evaluated, **changes)


def run_sweep(request: BatchSizeRequest, grid: Grid, file: ResultsFile, watch: Watch) -> None:
    """Run what is missing of the grid; each run is in the file as soon as it has ended.

    Raises:
        ValueError: the target is no lower than the loss of new weights.
        RunFailedError: see `_work_off`.
    """
    found = file.found.sweep
    assert found is not None
    sweep = Sweep(grid, found.runs)
    running: list[Cell] = []
    total = sum(len(grid.first_rates(batch)) for batch in grid.batches)
    total += len(grid.batches) * (len(grid.seeds) - 1)
    watch.done = len(found.runs)
    job = request.job

    def next_task() -> RunRequest | None:
        cell = sweep.next_cell(running)
        if cell is None:
            return None
        running.append(cell)
        return base_request(request, job, target_loss=request.target_loss, **vars(cell))

    def ended(task: RunRequest, result: RunResult) -> None:
        if result.outcome == "reached" and result.steps == 0:
            raise ValueError(
                f"--target-loss {request.target_loss:g} is reached by new weights, whose loss is "
                f"{result.curve[0][1]:.4g}. Give a lower one."
            )
        running[:] = [
            cell
            for cell in running
            if (cell.batch, cell.rate, cell.seed) != (task.batch, task.rate, task.seed)
        ]
        run = SweepRun.of(result, batch=task.batch, rate=task.rate, seed=task.seed, limit=task.limit)
        sweep.add(run)
        assert file.found.sweep is not None
        file.change(sweep=file.found.sweep.model_copy(update={"runs": tuple(sweep.runs)}))
        words = {"reached": f"{result.steps} steps", "limit": f"not within {task.limit} steps"}
        said = words.get(result.outcome, f"{result.outcome} after {result.steps} steps")
        watch.ended(f"batch {task.batch}, rate {task.rate:.4g}: {said}", total=total)

    if sweep.next_cell(()) is None:
        return
    with pool_of(request) as pool, watch.bar:
        _work_off(pool, next_task, ended)


def run_noise(request: BatchSizeRequest, fit: CriticalBatch, file: ResultsFile, watch: Watch) -> None:
    """Run the best run nearest the critical batch once more, with the noise scale measured along it."""
    found, seed = file.found.sweep, request.job.train.seed
    assert found is not None
    best = [best_run(found.runs, batch, first_seed=seed) for batch in {run.batch for run in found.runs}]
    reached = sorted((run for run in best if run is not None), key=lambda run: run.batch)
    wanted = math.log(min(max(fit.b_crit, reached[0].batch), reached[-1].batch))
    chosen = min(reached, key=lambda run: abs(math.log(run.batch) - wanted))
    if (found.noise_batch, found.noise_rate) == (chosen.batch, chosen.rate):
        return
    watch.say(f"the noise scale along the run of batch {chosen.batch}")
    least, most = _NOISE_EXAMPLES
    task = base_request(
        request,
        request.job,
        batch=chosen.batch,
        rate=chosen.rate,
        seed=chosen.seed,
        limit=chosen.steps,
        target_loss=found.target_loss,
        noise_examples=round(min(max(fit.e_min, least), most)),
    )
    task = replace(task, folder=str(request.job.model.folder))  # here, wherever the others ran

    def ended(_: RunRequest, result: RunResult) -> None:
        noise = tuple(Noise.of(point) for point in result.noise)
        changes = {"noise_batch": chosen.batch, "noise_rate": chosen.rate, "noise": noise}
        file.change(sweep=found.model_copy(update=changes))

    with local_tasks(run_short, num_slots=1) as pool:
        _work_off(pool, functools.partial(next, iter((task,)), None), ended)


def run_branches(
    request: BatchSizeRequest, file: ResultsFile, watch: Watch, *, checkpoint: str, rate: float
) -> None:
    """Run what is missing of the branches.

    Args:
        request: what is asked.
        file: has the branches of this checkpoint, or none.
        watch: told of each.
        checkpoint: its folder.
        rate: that it was written at.
    """
    found = file.found.branched
    assert found is not None
    runs: list[BranchRun] = list(found.runs)
    running: list[tuple[int, int]] = []
    rule = rate_rule(request.job.optimizer.name)
    total = len(request.seeds) * (1 + len(request.factors))
    watch.done = len(runs)

    def next_task() -> RunRequest | None:
        chosen = next_branch(request.factors, request.seeds, runs, running)
        if chosen is None:
            return None
        running.append(chosen)
        factor, seed = chosen
        return base_request(
            request,
            request.job,
            batch=factor * found.batch,
            rate=rate * rate_factor_of(factor, rule),
            seed=seed,
            limit=found.window // factor,
            target_loss=None,
            checkpoint=checkpoint,
        )

    def ended(task: RunRequest, result: RunResult) -> None:
        if not result.curve:
            raise RunFailedError(
                f"the loss at checkpoint {checkpoint} is not finite. Name an earlier one.", bad_input=True
            )
        factor = task.batch // found.batch
        running.remove((factor, task.seed))
        after = result.curve[-1][1] if result.outcome == "limit" else None
        run = BranchRun(
            factor=factor,
            seed=task.seed,
            rate=task.rate,
            outcome="limit" if after is not None else "diverged",
            loss_before=result.curve[0][1],
            loss_after=after,
        )
        runs.append(run)
        file.change(branched=_with_runs(found, runs))
        said = "diverged" if after is None else f"loss {run.loss_before:.4f} to {after:.4f}"
        watch.ended(f"{factor} x {found.batch}, seed {task.seed}: {said}", total=total)

    if next_branch(request.factors, request.seeds, runs, ()) is None:
        return
    with pool_of(request) as pool, watch.bar:
        _work_off(pool, next_task, ended)


def _with_runs(found: BranchesFound, runs: list[BranchRun]) -> BranchesFound:
    return found.model_copy(update={"runs": tuple(runs)})
