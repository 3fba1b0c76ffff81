"""The best schedule that the judge has accepted so far, and the answer made of it."""

from __future__ import annotations

import time

from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.solvers.bounds import least_need_bytes

# Sums of seconds in another order differ by about this share.
_ROUNDING = 1e-9


class Incumbent:
    """Keeps the cheapest schedule within the budget.

    Args:
        problem: what is to be solved.
        solver: name of the algorithm.
    """

    def __init__(self, problem: Problem, *, solver: str) -> None:
        self.problem = problem
        self.solver = solver
        self.start = time.perf_counter()
        self.schedule: Schedule | None = None
        self.time_s = float("inf")
        self.bound_s = problem.costed.step_s

    def offer(self, schedule: Schedule) -> int:
        """Replay a schedule; keep it if it fits and is cheaper than the one before. Bytes above the budget."""
        trace = simulate(self.problem, schedule)
        if trace.peak_bytes <= self.problem.budget_bytes and trace.time_s < self.time_s:
            self.schedule, self.time_s = schedule, trace.time_s
        return max(0, trace.peak_bytes - self.problem.budget_bytes)

    def elapsed_s(self) -> float:
        """Wall-clock seconds since the solve began."""
        return time.perf_counter() - self.start

    def attains_bound(self, *, gap: float = 0.0) -> bool:
        """Whether the schedule takes no more than the bound and the gap (a share of the step's time)."""
        return self.time_s - self.bound_s <= max(gap, _ROUNDING) * self.problem.costed.step_s

    def answer(self, *, infeasible: bool = False, gap: float = 0.0) -> Solution:
        """The answer as it stands.

        Args:
            infeasible: proven that there is no schedule.
            gap: asked share of the step's time that may stay unproven.

        Returns:
            `OPTIMAL` where the schedule takes no more than the bound and the gap; without a schedule `NOT_FOUND`,
            or `INFEASIBLE` where that is proven.
        """
        if self.schedule is None:
            infeasible = infeasible or least_need_bytes(self.problem) > self.problem.budget_bytes
            status = Status.INFEASIBLE if infeasible else Status.NOT_FOUND
        else:
            status = Status.OPTIMAL if self.attains_bound(gap=gap) else Status.FEASIBLE
        return Solution(
            status=status,
            schedule=self.schedule,
            time_s=self.time_s,
            bound_s=min(self.bound_s, self.time_s),
            solve_s=self.elapsed_s(),
            solver=self.solver,
        )
