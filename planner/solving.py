"""A schedule within the budget, by any solver, or the reason why there is none."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from cost_models.units import format_bytes
from planner.errors import InfeasibleError
from planner.problem import Problem, StaticMemory
from planner.residency import holder_objects, peak_owner
from planner.solution import Solution, Status
from planner.solvers import DEFAULT_SOLVER, Solver, solver_named
from planner.solvers.exhaustive import Exhaustive
from planner.tradeoff.smallest import Smallest, smallest_budget


def chosen_solver(name: str, *, time_limit_s: float, free_order: bool = False, **options: Any) -> Solver:
    """The solver that was asked for.

    Args:
        name: of the solver.
        time_limit_s: seconds of one search.
        free_order: it may change the order of the nodes.
        options: others that it may have, such as ``gap`` or ``threads``.

    Raises:
        ValueError: there is none of that name, or it keeps the given order and was asked not to.
    """
    solver = solver_named(name, time_limit_s=time_limit_s, free_order=free_order, **options)
    if free_order and "free_order" not in {field.name for field in fields(solver)}:  # type: ignore[arg-type]
        raise ValueError(
            f"the solver {name!r} keeps the given order of the nodes. "
            f"Leave out --free-order, or choose --solver {DEFAULT_SOLVER}."
        )
    return solver


def solve(
    problem: Problem,
    *,
    time_limit_s: float,
    solver: str = DEFAULT_SOLVER,
    free_order: bool = False,
    **options: Any,
) -> Solution:
    """A schedule within the budget.

    Args:
        problem: graph, seconds, budget, static memory.
        time_limit_s: seconds of the search; an answer "none" takes as long again to find what would work.
        solver: name of the algorithm.
        free_order: it may change the order of the nodes.
        options: of the solver, such as ``threads``.

    Returns:
        An answer with a schedule.

    Raises:
        InfeasibleError: none was found; carries the smallest budget that is known to work and what holds it up.
        SolverError: the solver itself failed.
        ValueError: no such solver.
    """
    chosen = chosen_solver(solver, time_limit_s=time_limit_s, free_order=free_order, **options)
    solution = chosen.solve(problem)
    if solution.schedule is not None:
        return solution
    # Without a proof the whole way down is searched, as it is for any smaller budget: a budget that one refusal
    # named is not refused by the next.
    fails_bytes = problem.budget_bytes if solution.status is Status.INFEASIBLE else -1
    smallest = smallest_budget(
        problem,
        solver,
        time_limit_s=time_limit_s,
        fails_bytes=fails_bytes,
        free_order=free_order,
        **options,
    )
    if smallest.budget_bytes > problem.budget_bytes:
        raise infeasible(problem, smallest, solver=solver, status=solution.status, free_order=free_order)
    return Solution(
        status=Status.FEASIBLE,
        schedule=smallest.schedule,
        time_s=smallest.trace.time_s,
        bound_s=min(problem.costed.step_s, smallest.trace.time_s),
        solve_s=solution.solve_s,
        solver=smallest.solver,
    )


def infeasible(
    problem: Problem, smallest: Smallest, *, solver: str, status: Status, free_order: bool
) -> InfeasibleError:
    """The error for a budget below the smallest that is known to work.

    Args:
        problem: with the budget that was asked.
        smallest: what works.
        solver: that was asked.
        status: of its answer; "infeasible" is proven for its kind of schedule alone.
        free_order: it might change the order of the nodes.
    """
    static = problem.static
    owner = peak_owner(problem, smallest.schedule, smallest.trace)
    asked, works = format_bytes(problem.budget_bytes), format_bytes(smallest.budget_bytes)
    if asked == works:
        asked = f"{problem.budget_bytes} B"
    is_tiny = solver == DEFAULT_SOLVER and len(problem.costed.graph.nodes) <= Exhaustive.most_nodes
    proven = smallest.floor_bytes > problem.budget_bytes or (is_tiny and status is Status.INFEASIBLE)
    others = [] if solver == DEFAULT_SOLVER else ["leave out --solver"]
    others += [] if free_order else ["try --free-order"]
    if proven:
        failure, others = (
            f"no plan fits {asked}",
            [] if smallest.floor_bytes > problem.budget_bytes else others,
        )
    elif status is Status.INFEASIBLE:
        failure = f"no plan of the kind that {solver} makes fits {asked}"
    else:
        failure, others = f"no plan was found for {asked} in the given time", [*others, "give more time"]
    always = ""
    if static.resident_bytes:
        resident = format_bytes(static.resident_bytes)
        always = f"; {resident} of it are there throughout: {_parts(static)}"
    advice = ["raise the budget", *(("make the batch smaller", "shard the model") if always else ()), *others]
    advice[0] = advice[0].capitalize()
    said = advice[0] if len(advice) == 1 else f"{', '.join(advice[:-1])}, or {advice[-1]}"
    error = InfeasibleError(
        f"{failure}: the smallest budget found that works is {works} ({smallest.budget_bytes} B), "
        f"held up by {owner}{always}. {said}.",
        budget_bytes=problem.budget_bytes,
        smallest_feasible_bytes=smallest.budget_bytes,
        owner=owner,
        smallest=smallest.solution,
    )
    error.facts = {
        "status": "infeasible" if proven else "not_found",
        "least_need_bytes": smallest.floor_bytes,
        "held_up_by_values": holder_objects(problem, smallest.schedule, smallest.trace),
    }
    return error


def _parts(static: StaticMemory) -> str:
    """What the memory that is always there consists of."""
    parts = {
        "parameters": static.parameter_bytes,
        "gradients": static.gradient_bytes,
        "optimizer state": static.optimizer_bytes,
        "gradient buckets": static.bucket_bytes,
        "batch": static.batch_bytes,
        "what a measured step took beyond its prediction": static.unexplained_bytes,
    }
    return ", ".join(name for name, size in parts.items() if size)
