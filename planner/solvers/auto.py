"""Which solvers, in which order, within which time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from planner.problem import Problem
from planner.solution import Solution, Status
from planner.solvers.materialization import Materialization
from planner.solvers.retain_all import RetainAll


@dataclass(frozen=True)
class Auto:
    """Everything retained where that fits; else the materialization MILP.

    Attributes:
        time_limit_s: for all of them together.
        gap: asked share of the step's time that may stay unproven.
        threads: of the MILP solver.
    """

    name: ClassVar[str] = "auto"

    time_limit_s: float = 20.0
    gap: float = 0.002
    threads: int = 2

    def solve(self, problem: Problem) -> Solution:
        """The best schedule that any of the solvers finds.

        Args:
            problem: graph, seconds, budget, static memory.

        Returns:
            The answer, with the name of the solver that found it.
        """
        start = time.perf_counter()
        solution = RetainAll().solve(problem)
        if solution.status is not Status.OPTIMAL:
            solution = Materialization(self.time_limit_s, self.gap, self.threads).solve(problem)
        return replace(solution, solve_s=time.perf_counter() - start)
