"""The planner as a tool of its own: python -m planner JOB.yaml --budget 4GiB."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cost_models.hardware import load_hardware
from cost_models.units import parse_seconds
from planner.errors import InfeasibleError
from planner.plan_file import Plan
from planner.report import infeasible_object, plan_lines, plan_object
from planner.workload import Workload, check_budget

JobPath = Annotated[
    Path, typer.Argument(metavar="JOB", help="A job file, for example deploy/jobs/quickstart.yaml.")
]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="'4GiB', '60%', '50% of activations' or 'none'.")
]
HardwareName = Annotated[str | None, typer.Option("--hardware", help="Exact name of a device, or 'host'.")]
OutPath = Annotated[Path | None, typer.Option("--out", metavar="PLAN", help="Write the plan as JSON.")]
TimeLimit = Annotated[str | None, typer.Option("--time-limit", help="Of the solver, such as '20s'.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]

PlanWorkload = Callable[[Workload], Plan]


def answer(
    workload: Workload,
    plan_workload: PlanWorkload,
    *,
    budget: str | None,
    hardware: str | None,
    out: Path | None,
    time_limit: str | None,
    as_json: bool,
) -> int:
    """Plan a workload and print the answer.

    Args:
        workload: as its file says.
        plan_workload: makes the plan of a workload.
        budget: replaces the file's.
        hardware: replaces the file's.
        out: file for the plan; none is written without a plan.
        time_limit: replaces the file's.
        as_json: one object instead of lines.

    Returns:
        Exit status: 0 with a plan, 1 where no plan fits.

    Raises:
        ValueError: bad input.
    """
    changes: dict[str, object] = {}
    if budget is not None:
        changes["budget"] = check_budget(budget)
    if hardware is not None:
        changes["hardware"] = hardware
    if time_limit is not None:
        if not 0.0 < parse_seconds(time_limit) < float("inf"):
            raise ValueError(f"--time-limit must be more than 0 and finite, got {time_limit!r}. Write '20s'.")
        changes["solver"] = type(workload.solver)(time_limit=time_limit)
    workload = workload.model_copy(update=changes)
    load_hardware(workload.hardware)
    if out is not None:
        _check_out(out)
    try:
        plan = plan_workload(workload)
    except InfeasibleError as error:
        if as_json:
            print(json.dumps(infeasible_object(error)))
        print(f"lowtide: {error}", file=sys.stderr)
        return 1
    if out is not None:
        try:
            plan.save(out)
        except OSError as error:
            raise ValueError(
                f"--out {out} cannot be written: {error.strerror}. Name another file."
            ) from error
    print(json.dumps(plan_object(plan)) if as_json else "\n".join(plan_lines(plan)))
    return 0


def _check_out(out: Path) -> None:
    """Raise ValueError unless a regular file can be written there."""
    folder = out.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"--out {out}: there is no folder {folder}. Make it first.")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out} exists and is no regular file. Name a file.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: the folder {folder} cannot be written. Name another.")


def quiet_libraries() -> None:
    """Keep torch's profiler library (it reads this when torch is loaded) and its tracer off the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL + 1)


def _command(
    job: JobPath,
    budget: BudgetText = None,
    hardware: HardwareName = None,
    out: OutPath = None,
    time_limit: TimeLimit = None,
    as_json: AsJson = False,
) -> None:
    """Plan the training step that a file describes; one rank, without data parallelism."""
    try:
        workload = Workload.load(job)
        from planner.pipeline import plan_workload

        status = answer(
            workload,
            plan_workload,
            budget=budget,
            hardware=hardware,
            out=out,
            time_limit=time_limit,
            as_json=as_json,
        )
    except ValueError as error:
        print(f"lowtide: {error}", file=sys.stderr)
        status = 2
    raise typer.Exit(status)


def main() -> None:
    """Entry point of ``python -m planner``."""
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="lowtide: %(message)s", stream=sys.stderr)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(epilog="Example: python -m planner deploy/jobs/quickstart.yaml --budget 70% --json")(_command)
    app(prog_name="python -m planner")


if __name__ == "__main__":
    main()
