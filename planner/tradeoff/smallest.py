"""The smallest budget for which a plan is known, by bisection."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import Trace, simulate
from planner.solution import Solution, Status
from planner.solvers import DEFAULT_SOLVER, solver_named, solver_names
from planner.solvers.bounds import least_need_bytes
from planner.solvers.materialization import Materialization
from planner.solvers.retain_all import RetainAll, retain_all_schedule

# The search ends when no budget smaller than this share can still be found.
_PRECISION = 0.005
# Quick ones that the default solver's answer may come from as well.
_FLAT_SOLVERS = ("eviction", "griewank", "chain_dp", "chen_greedy", "chen_sqrt")
# Solvers that can take the flattest schedule of the materialization MILP as theirs.
_WITH_FLATTEST = ("auto", "materialization")
# One trial takes at most this share of the time that is left.
_SHARE_OF_TIME = 0.3


@dataclass(frozen=True)
class Smallest:
    """A schedule of little peak memory.

    Attributes:
        schedule: it, whatever its time.
        trace: its replay; `trace.peak_bytes` is the smallest budget that is known to work.
        floor_bytes: no schedule at all works with less.
        solver: that found it.
    """

    schedule: Schedule
    trace: Trace
    floor_bytes: int
    solver: str

    @property
    def budget_bytes(self) -> int:
        """The smallest budget that is known to work."""
        return self.trace.peak_bytes

    @property
    def solution(self) -> Solution:
        """The schedule as a solver's answer, its time not proven."""
        return Solution(Status.FEASIBLE, self.schedule, self.trace.time_s, 0.0, 0.0, self.solver)


def smallest_budget(
    problem: Problem,
    solver: str,
    *,
    time_limit_s: float,
    fails_bytes: int = -1,
    **options: Any,
) -> Smallest:
    """Search for the smallest budget within which a solver finds a plan, by bisection.

    Args:
        problem: its budget is not read.
        solver: name of the algorithm.
        time_limit_s: seconds of the whole search.
        fails_bytes: a budget with which it is known to fail.
        options: of the solver.

    Returns:
        The flattest schedule that was found. There always is one: everything retained.
    """
    deadline = time.perf_counter() + time_limit_s
    schedule = retain_all_schedule(problem)
    floor_bytes = least_need_bytes(problem, free_order=options.get("free_order", False))
    best = Smallest(schedule, simulate(problem, schedule), floor_bytes, RetainAll.name)
    graph = problem.costed.graph
    if solver in _WITH_FLATTEST and 0 < graph.num_forward < len(graph.nodes):
        flattest, trace = Materialization(time_limit_s=time_limit_s * _SHARE_OF_TIME).smallest_peak(problem)
        if trace.peak_bytes < best.budget_bytes:
            best = dataclasses.replace(best, schedule=flattest, trace=trace, solver=Materialization.name)
    fails = max(best.floor_bytes - 1, fails_bytes)
    trial_bytes = fails + 1
    while best.budget_bytes - fails > max(1.0, _PRECISION * best.budget_bytes):
        left_s = deadline - time.perf_counter()
        if left_s <= 0.0:
            break
        trial = dataclasses.replace(problem, budget_bytes=trial_bytes)
        found = _any_within(trial, solver, {**options, "time_limit_s": max(0.1, _SHARE_OF_TIME * left_s)})
        if found is None:
            fails = trial_bytes
        else:
            assert found.schedule is not None
            trace = simulate(problem, found.schedule)
            best = dataclasses.replace(best, schedule=found.schedule, trace=trace, solver=found.solver)
        trial_bytes = (fails + best.budget_bytes) // 2
    return best


def _any_within(problem: Problem, solver: str, options: dict[str, Any]) -> Solution | None:
    """An answer within the budget, whatever its time: the gap is as wide as can be."""
    quick = [name for name in _FLAT_SOLVERS if solver == DEFAULT_SOLVER and name in solver_names()]
    for name in (*quick, solver):
        found = solver_named(name, **{**options, "gap": 1e9}).solve(problem)
        if found.schedule is not None:
            return found
    return None
