"""`size` as a command of typer: every way to divide a job's step on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from cost_models.cluster_file import load_cluster
from orchestrator.job import JobSpec
from planner.cli.answer import Answer, Tell
from planner.cli.request import AsJson, BudgetText, JobPath, PicturePath, check_apart, check_picture
from planner.whole_file import check_writable, write_whole

ClusterText = Annotated[
    str | None, typer.Option("--cluster", help="Replaces the job's, such as 'dgx-a100-40gb x8' or 'host x2'.")
]
Batches = Annotated[
    str | None, typer.Option("--global-batch", help="Samples of one step, such as 512, or 256,512,1024.")
]
Minimize = Annotated[str, typer.Option("--minimize", help="time or energy of a sample.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Of the table.")]
WritePath = Annotated[
    Path | None,
    typer.Option("--write", metavar="JOB", help="Write the best as a job file for lowtide train."),
]
_OBJECTIVES = ("time", "energy")


def size_command(
    *,
    guard: Callable[..., AbstractContextManager[None]],
    show: Callable[[Answer, bool], None],
    tell: Tell,
) -> Callable[..., None]:
    """The command.

    Args:
        guard: turns what is raised into a sentence and an exit status.
        show: prints.
        tell: called with a line of progress.
    """

    def size(
        job: JobPath,
        cluster: ClusterText = None,
        global_batch: Batches = None,
        budget: BudgetText = None,
        minimize: Minimize = "time",
        rows: Rows = 12,
        write: WritePath = None,
        picture: PicturePath = None,
        as_json: AsJson = False,
    ) -> None:
        """Price every way to divide a job's step: micro-batch, accumulation, workers, sharding, and a plan."""
        with guard(as_json=as_json):
            if minimize not in _OBJECTIVES:
                raise ValueError(f"--minimize must be one of {', '.join(_OBJECTIVES)}, got {minimize!r}.")
            if picture is not None:
                check_picture(picture)
            spec = JobSpec.load(job)
            if budget is not None:
                spec = spec.with_changes({"budget": budget})
            where = load_cluster(cluster) if cluster is not None else spec.cluster_spec()
            batches = _batches(global_batch) or (spec.global_batch,)
            check_apart({"JOB": job, "--write": write, "--picture": picture})
            if write is not None:
                _check_new(write, beside=job)
            # Torch takes seconds; what is wrong with the files is said before.
            from orchestrator.size_job import size_batches
            from orchestrator.size_report import sizing_figure, sizing_lines, sizing_object

            objective = cast(Literal["time", "energy"], minimize)
            found, budget_bytes = size_batches(
                spec, where, global_batches=batches, objective=objective, tell=tell
            )
            best, lines = found[0], sizing_lines(found, where, budget_bytes=budget_bytes, rows=rows)
            if write is not None and not best.refused:
                written = spec.with_shape(
                    best.shape, is_blockwise=best.is_blockwise, cluster=where, budget_bytes=budget_bytes
                )
                write_whole(write, written.to_yaml())
                lines.append(f"the best is in {write}")
            if picture is not None:
                from planner.report.plots import saved

                write_whole(picture, saved(sizing_figure(found, where), picture.suffix[1:]))
            complaint = f"no way to divide the step fits: {best.refused}" if best.refused else ""
            show(
                Answer(
                    int(bool(best.refused)),
                    sizing_object(found, where, budget_bytes=budget_bytes),
                    lines,
                    complaint,
                ),
                as_json,
            )
            raise typer.Exit(int(bool(best.refused)))

    return size


def _check_new(path: Path, *, beside: Path) -> None:
    """Raise ValueError unless a new job file can be written beside a job."""
    if path.resolve().parent != beside.resolve().parent:
        raise ValueError(f"--write {path} must lie beside {beside}: its targets are relative to its folder.")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--write {path} must end in .yaml or .yml: it becomes a job file.")
    if path.exists() or path.is_symlink():
        raise ValueError(f"--write {path} exists already and is left as it is. Name a new file.")
    check_writable(path, option="--write")


def _batches(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= 1 << 24 for word in words):
        raise ValueError(
            f"--global-batch must list whole numbers from 1 to 2^24, got {text!r}. Write 256,512."
        )
    return tuple(dict.fromkeys(int(word) for word in words))
