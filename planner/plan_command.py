"""`plan` as a command: its options, and the answer to what was asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cost_models.hardware import load_hardware
from cost_models.units import parse_seconds
from planner.errors import InfeasibleError, SolverError
from planner.report import infeasible_object, plan_lines, plan_object
from planner.solvers import solver_named
from planner.whole_file import check_writable, write_whole
from planner.workload import SolverSpec, Workload, check_budget

if TYPE_CHECKING:
    from planner.bare_answer import BareAnswer
    from planner.plan_file import Plan
    from planner.prepared import Prepared

JobPath = Annotated[
    Path, typer.Argument(metavar="JOB", help="A job file, for example deploy/jobs/quickstart.yaml.")
]
OptionalJobPath = Annotated[
    Path | None, typer.Argument(metavar="[JOB]", help="A job file, for example deploy/jobs/quickstart.yaml.")
]
GraphPath = Annotated[
    Path | None,
    typer.Option("--graph", metavar="FILE", help="Plan a bare cost graph (JSON) in place of a job."),
]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="'4GiB', '60%', '50% of activations' or 'none'.")
]
HardwareName = Annotated[str | None, typer.Option("--hardware", help="Exact name of a device, or 'host'.")]
OutPath = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the plan, or a graph's schedule, as JSON.")
]
PicturePath = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="Draw it: a name that ends in .png or .pdf.")
]
TimeLimit = Annotated[str | None, typer.Option("--time-limit", help="Of the solver, such as '20s'.")]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="Name of the algorithm; 'auto' combines them.")
]
FreeOrder = Annotated[bool, typer.Option("--free-order", help="The order of the operations may change.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]

_SOLVER_LIBRARIES = ("highspy", "pulp")
_PICTURES = (".png", ".pdf", ".svg")

PrepareWorkload = Callable[[Workload], "Prepared[Plan]"]


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asked for; None where it said nothing.

    Attributes:
        job: a job file, or None with a graph.
        graph: a bare graph's file.
        budget: replaces the job's.
        hardware: replaces the job's.
        out: file for the plan; none is written without a plan.
        picture: file for a figure.
        time_limit: replaces the job's.
        solver: replaces the job's.
        free_order: the order of the operations may change.
    """

    job: Path | None = None
    graph: Path | None = None
    budget: str | None = None
    hardware: str | None = None
    out: Path | None = None
    picture: Path | None = None
    time_limit: str | None = None
    solver: str | None = None
    free_order: bool = False

    def __post_init__(self) -> None:
        if (self.job is None) == (self.graph is None):
            got = "both" if self.job is not None else "neither"
            raise ValueError(f"give a JOB file or --graph FILE, one of the two; got {got}.")
        if self.graph is not None and self.hardware is not None:
            raise ValueError(
                f"--hardware {self.hardware} has no meaning for a graph: its costs stand in its file. "
                "Leave it out."
            )
        if self.budget is not None:
            check_budget(self.budget)
        if self.hardware is not None:
            load_hardware(self.hardware)
        if self.time_limit is not None and not 0.0 < parse_seconds(self.time_limit) < float("inf"):
            raise ValueError(
                f"--time-limit must be more than 0 and finite, got {self.time_limit!r}. Write '20s'."
            )
        if self.out is not None:
            check_writable(self.out, option="--out")
        if self.picture is not None:
            check_picture(self.picture)

    def changed(self, spec: SolverSpec) -> SolverSpec:
        """A job's solver with what the command line says."""
        given = {"time_limit": self.time_limit, "name": self.solver, "free_order": self.free_order or None}
        data = spec.model_dump() | {key: value for key, value in given.items() if value is not None}
        if self.solver is not None:
            solver_named(self.solver, free_order=self.free_order)
        return SolverSpec.model_validate(data)

    def changed_workload(self, workload: Workload) -> Workload:
        """A job's workload with what the command line says."""
        changes: dict[str, object] = {"solver": self.changed(workload.solver)}
        for key in ("budget", "hardware"):
            if getattr(self, key) is not None:
                changes[key] = getattr(self, key)
        return workload.model_copy(update=changes)


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        status: exit status: 0 with a plan, 1 where there is none.
        payload: object for ``--json``.
        lines: for people.
        complaint: sentence for stderr, "" for none.
    """

    status: int
    payload: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    complaint: str = ""


def answer(
    request: PlanRequest, *, load: Callable[[Path], Workload], preparing: Callable[[], PrepareWorkload]
) -> Answer:
    """Do what was asked.

    Args:
        request: job or graph, and options.
        load: reads a job file.
        preparing: gives what captures the step of a workload; it may load torch.

    Raises:
        ValueError: bad input.
    """
    try:
        plan = _planned(request, load, preparing)
    except InfeasibleError as error:
        return Answer(1, infeasible_object(error), complaint=str(error))
    except SolverError as error:
        return _failed(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _SOLVER_LIBRARIES:
            raise
        return _failed(f"the solver needs {error.name}, which is not installed. Install it.")
    if request.out is not None:
        plan.save(request.out)
    if request.picture is not None:
        draw_memory(plan, request.picture)
    return Answer(0, plan_object(plan), plan_lines(plan))


def _failed(sentence: str) -> Answer:
    return Answer(1, {"status": "failed", "message": sentence}, complaint=sentence)


def check_picture(path: Path) -> None:
    """Raise ValueError unless a picture can be written there."""
    if path.suffix not in _PICTURES:
        raise ValueError(f"--picture {path} must end in one of {', '.join(_PICTURES)}.")
    check_writable(path, option="--picture")


def draw_memory(plan: Plan | BareAnswer, path: Path) -> None:
    """Draw memory over the step into a file."""
    from planner.plots import memory_figure, saved

    write_whole(path, saved(memory_figure(plan), path.suffix[1:]))


def explain_file(path: Path, *, depth: int | None, picture: Path | None) -> Answer:
    """What the plan in a file retains and rematerializes in each layer.

    Args:
        path: of the plan.
        depth: parts of a layer's qualified name that are kept; None for a short table.
        picture: file for a figure of memory over the step, or None.

    Raises:
        ValueError: the file holds no plan, or one without a table of its operations.
    """
    from planner.explain import explain, explanation_lines
    from planner.plan_file import Plan

    if picture is not None:
        check_picture(picture)
    plan = Plan.load(path)
    explanation = explain(plan, depth=depth)
    if picture is not None:
        draw_memory(plan, picture)
    return Answer(0, explanation.to_object(), explanation_lines(explanation))


def _planned(
    request: PlanRequest, load: Callable[[Path], Workload], preparing: Callable[[], PrepareWorkload]
) -> Plan | BareAnswer:
    prepared, budget, spec = _prepared(request, load, preparing)
    from planner.prepared import plan_within

    return plan_within(
        prepared,
        budget=budget,
        time_limit_s=spec.time_limit_s,
        solver=spec.name,
        free_order=spec.free_order,
    )


def _prepared(
    request: PlanRequest, load: Callable[[Path], Workload], preparing: Callable[[], PrepareWorkload]
) -> tuple[Prepared[Plan | BareAnswer], str, SolverSpec]:
    """What is planned, the budget, and the solver."""
    if request.graph is None:
        assert request.job is not None
        workload = request.changed_workload(load(request.job))
        return preparing()(workload), workload.budget, workload.solver
    from planner.bare_answer import bare_step

    return bare_step(request.graph), request.budget or "none", request.changed(SolverSpec())


def plan_command(
    load: Callable[[Path], Workload],
    preparing: Callable[[], PrepareWorkload],
    *,
    guard: Callable[..., AbstractContextManager[None]],
    show: Callable[[Answer, bool], None],
) -> Callable[..., None]:
    """The command, for `lowtide plan` and for ``python -m planner``.

    Args:
        load: reads a job file.
        preparing: as for `answer`.
        guard: ``guard(as_json=...)`` turns what is raised into a sentence and an exit status.
        show: ``show(answer, as_json)`` prints.

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
        solver: SolverName = None,
        free_order: FreeOrder = False,
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
                solver=solver,
                free_order=free_order,
            )
            got = answer(request, load=load, preparing=preparing)
            show(got, as_json)
            raise typer.Exit(got.status)

    return plan
