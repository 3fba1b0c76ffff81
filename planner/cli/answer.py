"""The answer to what `plan` was asked: a plan, a front, the smallest budget, the largest batch, or why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_models.hardware import load_hardware
from planner.cli.request import PlanRequest, check_apart, check_picture
from planner.errors import InfeasibleError, SolverError
from planner.inputs.workload import SolverSpec, Workload
from planner.report.summary import infeasible_object, plan_lines, plan_object
from planner.whole_file import write_whole

if TYPE_CHECKING:
    from planner.bare_plan import BarePlan
    from planner.plan_file import Plan
    from planner.prepared import Prepared

_SOLVER_LIBRARIES = ("highspy", "pulp")
# How much longer the largest batch's step may take.
_EXTRA_TIME = "forward"

PrepareWorkload = Callable[[Workload], "Prepared[Plan]"]
Tell = Callable[[str], None]


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
    request: PlanRequest,
    *,
    load: Callable[[Path], Workload],
    preparing: Callable[[], PrepareWorkload],
    tell: Tell,
) -> Answer:
    """Do what was asked.

    Args:
        request: job or graph, and options.
        load: reads a job file.
        preparing: gives what captures the step of a workload; it may load torch.
        tell: called with a line of progress.

    Raises:
        ValueError: bad input.
    """
    try:
        # These load the solvers' libraries, which may be missing.
        from planner.bare_plan import bare_step
        from planner.prepared import plan_within

        if request.max_batch:
            return _largest_batch(request, load, preparing, tell)
        if request.graph is None:
            assert request.job is not None
            workload = request.changed_workload(load(request.job))
            prepared: Prepared[Plan | BarePlan] = preparing()(workload)
            budget, spec = workload.budget, workload.solver
        else:
            prepared, budget = bare_step(request.graph), request.budget or "none"
            # A graph is small beside the step of a model: all of the time is for proving its plan.
            spec = request.changed(SolverSpec(gap="0%"))
        if request.sweep:
            return _sweep(request, prepared, spec, tell)
        if request.smallest:
            return _smallest(request, prepared, spec, tell)
        plan = plan_within(
            prepared,
            budget=budget,
            time_limit_s=spec.time_limit_s,
            gap=spec.gap_share,
            solver=spec.name,
            free_order=spec.free_order,
            minimize=spec.minimize,
        )
    except InfeasibleError as error:
        return Answer(1, infeasible_object(error), complaint=str(error))
    except SolverError as error:
        return _failed(str(error))
    except ImportError as error:
        library = _unloadable(error)
        if library is None:
            raise
        return _failed(
            f"the solver needs {library}, which cannot be loaded: {' '.join(str(error).split())}. Install it again."
        )
    _keep(request, plan)
    lines = plan_lines(plan)
    if spec.minimize == "energy" and isinstance(plan, Plan):
        lines.append(f"energy               {plan.energy_j:.3g} J on one device, by its power")
    return Answer(0, plan_object(plan), lines)


def _keep(request: PlanRequest, plan: Plan | BarePlan) -> None:
    """Write the files that were asked for."""
    if request.out is not None:
        plan.save(request.out)
    if request.picture is not None:
        draw_memory(plan, request.picture)


def _sweep(request: PlanRequest, prepared: Prepared[Plan | BarePlan], spec: SolverSpec, tell: Tell) -> Answer:
    from planner.report.tradeoff import front_lines, front_object
    from planner.tradeoff.sweep import sweep

    front = sweep(
        prepared.problem,
        solver=spec.name,
        free_order=spec.free_order,
        time_limit_s=spec.time_limit_s,
        tell=tell,
    )
    payload = front_object(front, prepared)
    if request.out is not None:
        write_whole(request.out, json.dumps(payload, indent=1) + "\n")
    if request.picture is not None:
        from planner.report.front_plot import front_figure
        from planner.report.plots import saved

        write_whole(request.picture, saved(front_figure(front), request.picture.suffix[1:]))
    return Answer(0, payload, front_lines(front))


def _smallest(
    request: PlanRequest, prepared: Prepared[Plan | BarePlan], spec: SolverSpec, tell: Tell
) -> Answer:
    from planner.report.tradeoff import smallest_facts, smallest_lines
    from planner.tradeoff.smallest import smallest_budget

    tell("smallest budget: searching")
    smallest = smallest_budget(
        prepared.problem, spec.name, time_limit_s=spec.time_limit_s, free_order=spec.free_order
    )
    problem = replace(prepared.problem, budget_bytes=smallest.budget_bytes)
    _keep(request, prepared.answer(problem, smallest.solution))
    payload = {"status": "feasible", **prepared.facts(), **smallest_facts(smallest, prepared)}
    return Answer(0, payload, smallest_lines(smallest, prepared))


def _largest_batch(
    request: PlanRequest,
    load: Callable[[Path], Workload],
    preparing: Callable[[], PrepareWorkload],
    tell: Tell,
) -> Answer:
    from cost_models.roofline import Roofline
    from planner.problem import Budget, BudgetKind
    from planner.report.tradeoff import batch_lines, batch_object
    from planner.tradeoff.largest_batch import AllowedTime, largest_batch
    from planner.tradeoff.rebatched import batch_size_of, with_batch_size

    assert request.job is not None
    allowed = AllowedTime.parse(request.extra_time or _EXTRA_TIME)
    workload = request.changed_workload(load(request.job))
    if Budget.parse(workload.budget).kind is not BudgetKind.BYTES:
        raise ValueError(
            f"the largest batch needs a budget in bytes, got {workload.budget!r}: shares grow with the batch. "
            "Write --budget 16GiB."
        )
    size = batch_size_of(workload)
    prepare = preparing()
    found = largest_batch(
        lambda count: prepare(with_batch_size(workload, count)),
        size=size,
        budget=workload.budget,
        allowed=allowed,
        cost_model=Roofline(load_hardware(workload.hardware_place)),
        solver=workload.solver.name,
        time_limit_s=workload.solver.time_limit_s,
        tell=tell,
    )
    _keep(request, found.plan)
    return Answer(0, batch_object(found), batch_lines(found))


def _failed(sentence: str) -> Answer:
    return Answer(1, {"status": "failed", "message": sentence}, complaint=sentence)


def _unloadable(error: ImportError) -> str | None:
    """The solver's library that is missing or that failed while it was loaded; None for another module."""
    loading = [error.name or ""]
    at = error.__traceback__
    while at is not None:
        loading.append(at.tb_frame.f_globals.get("__name__", ""))
        at = at.tb_next
    roots = {name.partition(".")[0] for name in loading}
    return next((library for library in _SOLVER_LIBRARIES if library in roots), None)


def draw_memory(plan: Plan | BarePlan, path: Path) -> None:
    """Draw memory over the step into a file."""
    from planner.report.plots import memory_figure, saved

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
    from planner.plan_file import Plan
    from planner.report.explain import explain, explanation_lines

    if picture is not None:
        check_picture(picture)
        check_apart({"the plan": path, "--picture": picture})
    _check_is_no_schedule(path)
    plan = Plan.load(path)
    explanation = explain(plan, depth=depth)
    if picture is not None:
        draw_memory(plan, picture)
    return Answer(0, explanation.to_object(), explanation_lines(explanation))


def _check_is_no_schedule(path: Path) -> None:
    """Raise ValueError where the file holds the schedule of a bare graph."""
    try:
        listed = isinstance(json.loads(path.read_text()), list)
    except (OSError, ValueError, RecursionError):
        return  # Plan.load says what is wrong
    if listed:
        raise ValueError(
            f"{path} is a JSON list: a graph's schedule is only the list of its nodes, and explain reads plans of "
            "models. Name a file that lowtide plan JOB --out wrote."
        )
