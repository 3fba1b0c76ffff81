"""`lowtide calibrate`: the operations of jobs, or of standard networks, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cost_models.hardware import HOST
from cost_models.roofline import Roofline
from orchestrator.job import JobSpec
from orchestrator.phases import phases_of
from planner.calibrating.calibrate import Calibration
from planner.calibrating.companions import companions
from planner.calibrating.operations import RunsAlone, operations_of
from planner.calibrating.optimizer_step import optimizer_step
from planner.calibrating.request import CalibrationRequest
from planner.calibrating.setting import setting_here
from planner.calibrating.standard import standard_steps
from planner.capture import capture
from planner.cli.answer import Answer
from planner.inputs.workload import Workload
from planner.inputs.yaml_reader import read_yaml
from planner.measure import threads as with_threads
from planner.prepare import step_of
from planner.pricing import hardware_of
from planner.report.calibration import calibration_figure, calibration_lines, calibration_object
from planner.tradeoff.rebatched import batch_size_of, with_batch_size
from planner.whole_file import write_whole


@dataclass(frozen=True)
class MakeOperations:
    """Gives the operations to be measured; plain data, so that it can be sent to other processes.

    Attributes:
        jobs: files; () for standard networks.
        sizes: micro-batches besides a job's own.
        device: type of the device.
    """

    jobs: tuple[Path, ...]
    sizes: tuple[int, ...]
    device: str

    def __call__(self) -> dict[str, RunsAlone]:
        """Line -> operation.

        Raises:
            WorkloadError, CaptureError: a job cannot be read or captured.
        """
        if not self.jobs:
            return dict(operations_of(standard_steps(torch.device(self.device))))
        found: dict[str, RunsAlone] = {}
        for path in self.jobs:
            workload = load_workload(path)
            own = batch_size_of(workload) if self.sizes else 0
            for size in dict.fromkeys((own, *self.sizes)):
                sized = with_batch_size(workload, size) if size else workload
                module, batch = step_of(sized, device=self.device)
                found |= operations_of([capture(module, batch)])
            step = job_optimizer_step(workload, device=self.device)
            found[step.line] = step
        return found


def load_workload(path: Path) -> Workload:
    """A job, or a workload that says nothing of training."""
    return JobSpec.load(path) if "train" in read_yaml(path) else Workload.load(path)


def job_optimizer_step(workload: Workload, *, device: str) -> RunsAlone:
    """The step of a job's (first) optimizer on all of its parameters."""
    module, _ = step_of(workload, device=device)
    if isinstance(workload, JobSpec):
        build = phases_of(workload)[0].make_optimizer
    else:
        build = workload.optimizer.factories()[0]
    spec = workload.optimizer
    return optimizer_step(module, build, name=f"{spec.name} {sorted(spec.hyper.items())}")


def calibrate(request: CalibrationRequest, show_progress: bool) -> Answer:
    """Measure what was asked for; what earlier runs measured in the same setting stays and counts.

    Raises:
        ValueError: a job is wrong, the device is missing, or the file holds something else.
    """
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no CUDA device here. Run on a machine with one, or use cpu."
        )
    spec = hardware_of(request.hardware)
    is_cpu = spec.kind == "cpu"
    if request.hardware != HOST and is_cpu != (request.device == "cpu"):
        raise ValueError(
            f"--hardware {request.hardware} is no {request.device} device, and would be priced by another's times. "
            "Measure on that device, or leave --hardware out."
        )
    threads = request.threads or _threads_of(request.jobs)
    device = torch.device(request.device)
    with with_threads(threads):
        setting = setting_here(
            hardware=spec.name, device=device, threads=threads, processes=request.processes
        )
        path = request.folder / setting.file_name
        calibration = Calibration.resumed(path, setting, device)
        make = MakeOperations(request.jobs, request.sizes, request.device)
        operations = make()
        try:
            request.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out {request.folder} cannot be made: {error.strerror}. Name another folder."
            ) from error
        with (
            companions(make, processes=request.processes, threads=threads) as (before_each, sharing),
            _bar(show_progress) as progress,
        ):
            calibration.measure(operations, visits=request.visits, progress=progress, before_each=before_each)
            if request.processes > 1:
                calibration.all_reduce, calibration.block_overheads_s = sharing()
            calibration.save()
        before = Roofline(hardware_of(request.hardware))
    found = calibration.measurements
    if request.picture is not None:
        from planner.report.plots import saved

        figure = calibration_figure(found, before)
        write_whole(request.picture, saved(figure, request.picture.suffix[1:]))
    place = str(path)
    return Answer(
        0,
        calibration_object(found, before, calibration.failed, place=place),
        calibration_lines(found, before, calibration.failed, place=place),
    )


def _threads_of(jobs: tuple[Path, ...]) -> int:
    """Threads of a rank of the jobs.

    Raises:
        ValueError: they differ.
    """
    loaded = {path: load_workload(path) for path in jobs}
    counts = {path: job.train.threads_per_worker for path, job in loaded.items() if isinstance(job, JobSpec)}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the jobs differ in train.threads_per_worker: {sorted(set(counts.values()))}. Measure them apart, "
            "or say --threads."
        )
    return next(iter(counts.values()), 1)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with an estimate of the time left."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("measuring"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(compact=True))
    bar = Progress(*columns, console=console, transient=True, disable=not shown or not console.is_terminal)
    task = bar.add_task("measuring", total=None)
    with bar:
        yield lambda done, of: bar.update(task, completed=done, total=of)
