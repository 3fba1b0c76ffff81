"""What is planned: a step with its seconds and static memory, before a budget; and its plan within one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from planner.errors import InfeasibleError
from planner.problem import Budget, Objective, Problem
from planner.simulate import Trace, simulate
from planner.solution import Solution
from planner.solvers.retain_all import retain_all_schedule
from planner.solving import chosen_solver, solve

Answered = TypeVar("Answered", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared(Generic[Answered]):
    """A step that waits for a budget.

    Attributes:
        problem: with a budget of 0.
        retained_all: its replay with everything retained.
        hardware: that it was priced on; None for a bare graph.
        written: ``written(problem, solution, trace, retained_all)`` makes a plan of a solution.
    """

    problem: Problem
    retained_all: Trace
    hardware: str | None
    written: Callable[[Problem, Solution, Trace, Trace], Answered]

    @staticmethod
    def of(
        problem: Problem,
        *,
        hardware: str | None,
        written: Callable[[Problem, Solution, Trace, Trace], T],
    ) -> Prepared[T]:
        """Replay the step with everything retained."""
        return Prepared(problem, simulate(problem, retain_all_schedule(problem)), hardware, written)

    def with_problem(self, problem: Problem) -> Prepared[Answered]:
        """The same step with other seconds or static memory."""
        return Prepared.of(problem, hardware=self.hardware, written=self.written)

    def budgeted(self, budget: str) -> Problem:
        """The problem with a budget as a user states it.

        Raises:
            ValueError: the budget is malformed.
        """
        budget_bytes = Budget.parse(budget).resolve_bytes(
            retained_all_peak_bytes=self.retained_all.peak_bytes,
            resident_bytes=self.problem.static.resident_bytes,
        )
        return dataclasses.replace(self.problem, budget_bytes=budget_bytes)

    def answer(self, problem: Problem, solution: Solution) -> Answered:
        """The plan of a solution that has a schedule; the judge has the last word."""
        assert solution.schedule is not None
        trace = simulate(problem, solution.schedule)
        assert trace.peak_bytes <= problem.budget_bytes, "the judge rejects the solver's schedule"
        return self.written(problem, solution, trace, self.retained_all)

    def facts(self) -> dict[str, Any]:
        """What is known of the step whatever the budget, for ``--json``."""
        graph = self.problem.costed.graph
        return {
            "retained_all_peak_bytes": self.retained_all.peak_bytes,
            "static_bytes": self.problem.static.resident_bytes,
            "num_nodes": len(graph.nodes),
            "graph_hash": graph.digest,
            "hardware": self.hardware,
        }


def plan_within(
    prepared: Prepared[T],
    *,
    budget: str,
    time_limit_s: float,
    gap: float,
    solver: str,
    free_order: bool,
    minimize: Objective = "time",
) -> T:
    """The plan of a step within a budget.

    Args:
        prepared: the step.
        budget: bytes with a unit, a share of the peak with everything retained, or "none".
        time_limit_s: seconds of the search.
        gap: share of the step's time that may stay unproven.
        solver: name of the algorithm.
        free_order: it may change the order of the nodes.
        minimize: seconds, or joules at the powers of the device that priced the step.

    Returns:
        A plan whose replayed peak is within the budget.

    Raises:
        InfeasibleError: none was found; carries the smallest budget that works.
        SolverError: the solver itself failed.
        ValueError: malformed budget, unknown solver, or energy where none is known.
    """
    chosen_solver(solver, time_limit_s=time_limit_s, free_order=free_order)
    problem = prepared.budgeted(budget)
    asked = problem
    if minimize == "energy":
        asked = dataclasses.replace(problem, costed=problem.costed.by_energy)
    try:
        solution = solve(asked, time_limit_s=time_limit_s, gap=gap, solver=solver, free_order=free_order)
    except InfeasibleError as error:
        error.facts |= {"solver": solver, **prepared.facts()}
        if error.smallest is not None:
            works = dataclasses.replace(problem, budget_bytes=error.smallest_feasible_bytes)
            error.plan = prepared.answer(works, error.smallest)
        raise
    return prepared.answer(problem, solution)
