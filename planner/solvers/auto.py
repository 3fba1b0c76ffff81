"""Which solvers, in which order, within which time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from planner.order import Reordered, flatter_order, reordered
from planner.problem import Problem
from planner.solution import Solution, Status
from planner.solvers.chain_dp import ChainDp
from planner.solvers.eviction import Eviction
from planner.solvers.materialization import Materialization
from planner.solvers.retain_all import RetainAll
from planner.solvers.staged import Staged

# Shares of the time that is left when their turn comes.
_ORDER_SHARE, _CHAIN_SHARE, _EVICTION_SHARE, _MATERIALIZATION_SHARE = 0.35, 0.03, 0.05, 0.5


@dataclass(frozen=True)
class Auto:
    """The best of all: what is quick first, then what proves, then what improves.

    Everything retained where that fits; the dynamic program where it proves itself optimal on a chain; eviction
    for a schedule within the first second; the materialization MILP where there is a backward phase; the staged
    MILP from the best of them.

    Attributes:
        time_limit_s: for all of them together.
        gap: asked share of the step's time that may stay unproven.
        threads: of the MILP solver.
        free_order: the order of the nodes may be changed first.
    """

    name: ClassVar[str] = "auto"

    time_limit_s: float = 20.0
    gap: float = 0.002
    threads: int = 2
    free_order: bool = False

    def solve(self, problem: Problem) -> Solution:
        """The best schedule that any of the solvers finds.

        Args:
            problem: graph, seconds, budget, static memory.

        Returns:
            The answer, with the name of the solver that found it. The bound is that of this solver's formulation.
        """
        begin = time.perf_counter()
        deadline = begin + self.time_limit_s
        solution = RetainAll().solve(problem)
        if solution.status is not Status.OPTIMAL:
            asked = self._in_better_order(problem, deadline) if self.free_order else None
            if asked is None:
                solution = self._in_given_order(problem, deadline)
            else:
                solution = self._in_given_order(asked.problem, deadline)
                if solution.schedule is not None:
                    # A bound that holds for this order says little of the others.
                    is_free = solution.time_s <= problem.costed.step_s * (1.0 + 1e-12)
                    solution = replace(
                        solution,
                        schedule=asked.in_given_indices(solution.schedule),
                        status=Status.OPTIMAL if is_free else Status.FEASIBLE,
                        bound_s=min(problem.costed.step_s, solution.time_s),
                    )
                elif solution.status is Status.INFEASIBLE:
                    solution = replace(solution, status=Status.NOT_FOUND)
        return replace(solution, solve_s=time.perf_counter() - begin)

    def _in_better_order(self, problem: Problem, deadline: float) -> Reordered | None:
        """The problem in an order that passes the budget less, or None if none was found."""
        left_s = deadline - time.perf_counter()
        order = flatter_order(problem, time_limit_s=_ORDER_SHARE * left_s)
        return None if order == tuple(range(len(order))) else reordered(problem, order)

    def _in_given_order(self, problem: Problem, deadline: float) -> Solution:
        """First runs in the graph's order."""

        def left_s() -> float:
            return max(deadline - time.perf_counter(), 0.1)

        solution = RetainAll().solve(problem)
        if solution.status is Status.OPTIMAL:
            return solution
        solution = ChainDp(time_limit_s=_CHAIN_SHARE * left_s()).solve(problem)
        if solution.status is Status.OPTIMAL:
            return solution
        evicted = Eviction(time_limit_s=_EVICTION_SHARE * left_s()).solve(problem)
        solution = _better(replace(solution, bound_s=problem.costed.step_s), evicted)
        graph = problem.costed.graph
        if graph.num_forward < len(graph.nodes):
            limit_s = _MATERIALIZATION_SHARE * left_s()
            retained = Materialization(limit_s, self.gap, self.threads).solve(problem)
            if (
                retained.schedule is None
                and solution.schedule is None
                and retained.status is Status.NOT_FOUND
            ):
                schedule, trace = Materialization(limit_s, threads=self.threads).smallest_peak(problem)
                if trace.peak_bytes <= problem.budget_bytes:
                    retained = replace(
                        retained, status=Status.FEASIBLE, schedule=schedule, time_s=trace.time_s
                    )
            solution = _better(solution, retained)
        staged = Staged(left_s(), self.gap, self.threads).solve(problem, solution.schedule)
        return _better(solution, staged)


def _better(first: Solution, second: Solution) -> Solution:
    """The cheaper answer; of equal ones the one that is proven closer."""
    if second.schedule is None:
        return first if first.schedule is not None or second.status is Status.NOT_FOUND else second
    if first.schedule is None or second.time_s < first.time_s * (1.0 - 1e-12):
        return second
    if second.time_s <= first.time_s * (1.0 + 1e-12) and second.bound_s > first.bound_s:
        return second
    return first
