"""`check` as a command of typer: a job's plan executed beside eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.answer import Answer, Tell
from planner.cli.request import (
    AsJson,
    BudgetText,
    ExecutorText,
    FreeOrder,
    Gap,
    HardwareName,
    JobPath,
    OutPath,
    PlanRequest,
    SolverName,
    TimeLimit,
)
from planner.errors import InfeasibleError
from planner.inputs.workload import Workload
from planner.report.summary import infeasible_object

if TYPE_CHECKING:
    from planner.checking.from_file import Checked

Rounds = Annotated[
    int, typer.Option("--rounds", min=1, help="Timed steps of each, planned and eager in turn.")
]


MakeReal = Callable[[Workload], "Checked"]


def check_command(
    load: Callable[[Path], Workload],
    making: Callable[[], MakeReal],
    *,
    guard: Callable[..., AbstractContextManager[None]],
    show: Callable[[Answer, bool], None],
    tell: Tell,
) -> Callable[..., None]:
    """The command; the arguments are those of `planner.cli.command.plan_command`.

    Args:
        load: reads a job file.
        making: gives what builds a workload's real model and batch; it may load torch.
        guard: turns what is raised into a sentence and an exit status.
        show: prints.
        tell: called with a line of progress.
    """

    def check(
        job: JobPath,
        budget: BudgetText = None,
        hardware: HardwareName = None,
        out: OutPath = None,
        time_limit: TimeLimit = None,
        gap: Gap = None,
        solver: SolverName = None,
        free_order: FreeOrder = False,
        executor: ExecutorText = None,
        rounds: Rounds = 5,
        as_json: AsJson = False,
    ) -> None:
        """Execute a job's plan beside eager: equal results, promised peak, extra time."""
        with guard(as_json=as_json):
            request = PlanRequest(
                job=job,
                budget=budget,
                hardware=hardware,
                out=out,
                time_limit=time_limit,
                gap=gap,
                solver=solver,
                free_order=free_order,
                executor=executor,
            )
            workload = request.changed_workload(load(job))
            got = _answer(making()(workload), workload, out=out, rounds=rounds, tell=tell)
            show(got, as_json)
            raise typer.Exit(got.status)

    return check


def _answer(checked: Checked, workload: Workload, *, out: Path | None, rounds: int, tell: Tell) -> Answer:
    from planner.checking.check import check
    from planner.measure import threads
    from planner.report.check import check_lines, check_object

    try:
        with threads(checked.num_threads):
            found = check(
                checked.prepared,
                checked.module,
                checked.step,
                budget=workload.budget,
                solver=workload.solver,
                rounds=rounds,
                tell=tell,
            )
    except InfeasibleError as error:
        return Answer(1, infeasible_object(error), complaint=str(error))
    if out is not None:
        found.plan.save(out)
    complaint = ""
    if not found.is_as_promised:
        complaint = "the planned step is not that of eager"
    elif not found.is_within_budget:
        complaint = "the measured peak is above the budget"
    return Answer(int(bool(complaint)), check_object(found), check_lines(found), complaint)
