"""Everything retained: the step as eager PyTorch runs it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from planner.just_in_time import just_in_time
from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import simulate
from planner.solution import Solution, Status


@dataclass(frozen=True)
class RetainAll:
    """Retain every value until its last use; no time is added, no memory saved."""

    name: ClassVar[str] = "retain_all"

    def solve(self, problem: Problem) -> Solution:
        """The one schedule without rematerialization, if it fits."""
        start = time.perf_counter()
        schedule = retain_all_schedule(problem)
        step_s = problem.costed.step_s
        fits = simulate(problem, schedule).peak_bytes <= problem.budget_bytes
        return Solution(
            status=Status.OPTIMAL if fits else Status.INFEASIBLE,
            schedule=schedule if fits else None,
            time_s=step_s if fits else float("inf"),
            bound_s=step_s,
            solve_s=time.perf_counter() - start,
            solver=self.name,
        )


def retain_all_schedule(problem: Problem) -> Schedule:
    """Every node once, every value freed at its last use."""
    graph = problem.costed.graph
    return just_in_time(graph, range(len(graph.values)))
