"""`plan` as a command of typer, for `lowtide` and for ``python -m planner``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import typer

from planner.cli.answer import Answer, PrepareWorkload, Tell, answer
from planner.cli.request import (
    AsJson,
    BudgetText,
    ExecutorText,
    ExtraTime,
    FreeOrder,
    Gap,
    GraphPath,
    HardwareName,
    MaxBatch,
    Minimize,
    OptionalJobPath,
    OutPath,
    PicturePath,
    PlanRequest,
    SmallestBudget,
    SolverName,
    Sweep,
    TimeLimit,
)
from planner.inputs.workload import Workload


def plan_command(
    load: Callable[[Path], Workload],
    preparing: Callable[[], PrepareWorkload],
    *,
    guard: Callable[..., AbstractContextManager[None]],
    show: Callable[[Answer, bool], None],
    tell: Tell,
) -> Callable[..., None]:
    """The command, for `lowtide plan` and for ``python -m planner``.

    Args:
        load: reads a job file.
        preparing: as for `answer`.
        guard: ``guard(as_json=...)`` turns what is raised into a sentence and an exit status.
        show: ``show(answer, as_json)`` prints.
        tell: called with a line of progress.

    Returns:
        A function for typer.
    """

    def plan(
        job: OptionalJobPath = None,
        graph: GraphPath = None,
        budget: BudgetText = None,
        hardware: HardwareName = None,
        out: OutPath = None,
        picture: PicturePath = None,
        time_limit: TimeLimit = None,
        gap: Gap = None,
        solver: SolverName = None,
        free_order: FreeOrder = False,
        minimize: Minimize = None,
        executor: ExecutorText = None,
        sweep: Sweep = False,
        smallest: SmallestBudget = False,
        max_batch: MaxBatch = False,
        extra_time: ExtraTime = None,
        as_json: AsJson = False,
    ) -> None:
        """Plan the training step of one rank, or a bare graph; nothing is trained."""
        with guard(as_json=as_json):
            request = PlanRequest(
                job=job,
                graph=graph,
                budget=budget,
                hardware=hardware,
                out=out,
                picture=picture,
                time_limit=time_limit,
                gap=gap,
                solver=solver,
                free_order=free_order,
                minimize=minimize,
                executor=executor,
                sweep=sweep,
                smallest=smallest,
                max_batch=max_batch,
                extra_time=extra_time,
            )
            got = answer(request, load=load, preparing=preparing, tell=tell)
            show(got, as_json)
            raise typer.Exit(got.status)

    return plan
