"""Which solvers, in which order, within which time."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from planner.errors import SolverError
from planner.order import flatter_order, reordered
from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import ScheduleError, simulate
from planner.solution import Solution, Status
from planner.solvers.bounds import least_need_bytes
from planner.solvers.chain_dp import ChainDp
from planner.solvers.eviction import Eviction
from planner.solvers.exhaustive import Exhaustive
from planner.solvers.griewank import Griewank
from planner.solvers.materialization import Materialization
from planner.solvers.retain_all import RetainAll
from planner.solvers.staged import Staged

# Shares of the time that is left when their turn comes.
_EXHAUSTIVE_SHARE = 0.3
_ORDER_SHARE, _CHAIN_SHARE, _EVICTION_SHARE, _MATERIALIZATION_SHARE = 0.35, 0.03, 0.05, 0.5
# The new order has more of the rest than the given one, which is tried as well.
_NEW_ORDER_SHARE = 0.75
_LAST_LOOK_S = 2.0
# Sums of seconds in another order differ by about this share.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Auto:
    """The best of all: what is quick first, then what proves, then what improves.

    Everything retained where that fits; the dynamic program where it proves itself optimal on a chain; every
    schedule of a tiny graph; eviction for a schedule within the first second; the materialization MILP where there
    is a backward phase; the staged MILP from the best of them.

    Attributes:
        time_limit_s: for all of them together.
        gap: asked share of the step's time that may stay unproven.
        threads: of the MILP solver.
        free_order: the order of the nodes may be changed first.
        start: a schedule to begin with, first runs in the given order; it need not fit the budget.
    """

    name: ClassVar[str] = "auto"

    time_limit_s: float = 20.0
    gap: float = 0.002
    threads: int = 2
    free_order: bool = False
    start: Schedule | None = None

    def solve(self, problem: Problem) -> Solution:
        """The best schedule that any of the solvers finds.

        Args:
            problem: graph, seconds, budget, static memory.

        Returns:
            The answer, with the name of the solver that found it. The bound is that of this solver's formulation.
        """
        begin = time.perf_counter()
        deadline = begin + self.time_limit_s
        search = self._in_free_order if self.free_order else self._in_given_order
        solution = search(problem, deadline)
        return replace(solution, solve_s=time.perf_counter() - begin)

    def _in_free_order(self, problem: Problem, deadline: float) -> Solution:
        """In an order that passes the budget less, then in the given one; bounds of one order are not kept."""

        def left_s() -> float:
            return deadline - time.perf_counter()

        solution = Exhaustive(_EXHAUSTIVE_SHARE * left_s(), free_order=True).solve(problem)
        if solution.status is not Status.NOT_FOUND:
            return solution
        order = flatter_order(problem, time_limit_s=_ORDER_SHARE * left_s())
        asked = reordered(problem, order)
        now = time.perf_counter()
        solution = self._in_given_order(asked.problem, now + _NEW_ORDER_SHARE * left_s())
        if solution.schedule is not None:
            solution = replace(solution, schedule=asked.in_given_indices(solution.schedule))
        step_s = problem.costed.step_s
        if solution.time_s > step_s * (1.0 + 1e-12) and order != tuple(range(len(order))):
            given = self._in_given_order(problem, deadline)
            solution = _better(replace(solution, bound_s=step_s), replace(given, bound_s=step_s))
        if solution.schedule is None:
            fits = least_need_bytes(problem, free_order=True) <= problem.budget_bytes
            return replace(solution, status=Status.NOT_FOUND if fits else Status.INFEASIBLE)
        return self._judged(replace(solution, bound_s=min(step_s, solution.time_s)), problem)

    def _in_given_order(self, problem: Problem, deadline: float) -> Solution:
        """First runs in the graph's order."""
        begin = time.perf_counter()

        def left_s() -> float:
            return max(deadline - time.perf_counter(), 0.1)

        solution = RetainAll().solve(problem)
        if solution.status is Status.OPTIMAL:
            return solution
        solution = ChainDp(time_limit_s=_CHAIN_SHARE * left_s()).solve(problem)
        if solution.status is Status.OPTIMAL:
            return solution
        exhaustive = Exhaustive(_EXHAUSTIVE_SHARE * left_s()).solve(problem)
        if exhaustive.status is not Status.NOT_FOUND:
            return exhaustive
        evicted = Eviction(time_limit_s=_EVICTION_SHARE * left_s()).solve(problem)
        solution = _better(replace(solution, bound_s=problem.costed.step_s), evicted)
        solution = _better(solution, self._started(problem))
        try:
            return self._improved(problem, solution, deadline, begin)
        except SolverError as error:
            if solution.schedule is None:
                raise
            logging.getLogger(__name__).warning("a MILP solver failed, the plan is not improved: %s", error)
            return self._judged(solution, problem)

    def _improved(self, problem: Problem, solution: Solution, deadline: float, begin: float) -> Solution:
        """The MILPs, from the best answer so far."""

        def left_s() -> float:
            return max(deadline - time.perf_counter(), 0.1)

        graph = problem.costed.graph
        if graph.num_forward < len(graph.nodes):
            limit_s = _MATERIALIZATION_SHARE * left_s()
            solution = _better(solution, Materialization(limit_s, self.gap, self.threads).solve(problem))
            if solution.schedule is None:
                solution = self._flat(problem, limit_s)
        limit_s = left_s()
        if self.gap > 0.0 and solution.schedule is not None and solution.gap <= self.gap:
            # Proven already: a look whether more than one rerun of a value pays, no longer than it took so far.
            limit_s = min(limit_s, max(_LAST_LOOK_S, time.perf_counter() - begin))
        staged = Staged(limit_s, self.gap, self.threads).solve(problem, solution.schedule)
        return self._judged(_better(solution, staged), problem)

    def _started(self, problem: Problem) -> Solution:
        """The given schedule, if there is one that fits."""
        nothing = Solution(Status.NOT_FOUND, None, float("inf"), problem.costed.step_s, 0.0, self.name)
        if self.start is None:
            return nothing
        try:
            trace = simulate(problem, self.start)
        except ScheduleError:
            return nothing  # of the given order, where another one is being solved
        if trace.peak_bytes > problem.budget_bytes:
            return nothing
        return replace(nothing, status=Status.FEASIBLE, schedule=self.start, time_s=trace.time_s)

    def _flat(self, problem: Problem, limit_s: float) -> Solution:
        """What needs little memory, whatever its time; nothing is proven."""
        flat = Griewank(limit_s).solve(problem)
        if flat.schedule is None:
            schedule, trace = Materialization(limit_s, threads=self.threads).smallest_peak(problem)
            if trace.peak_bytes <= problem.budget_bytes:
                flat = replace(
                    flat,
                    status=Status.FEASIBLE,
                    schedule=schedule,
                    time_s=trace.time_s,
                    solver=Materialization.name,
                )
        return replace(flat, bound_s=problem.costed.step_s)

    def _judged(self, solution: Solution, problem: Problem) -> Solution:
        """Optimal is what is proven within the asked gap, by whichever bound."""
        if solution.schedule is None:
            return solution
        unproven_s = solution.time_s - solution.bound_s
        is_optimal = unproven_s <= max(self.gap, _ROUNDING) * problem.costed.step_s
        return replace(solution, status=Status.OPTIMAL if is_optimal else Status.FEASIBLE)


def _better(first: Solution, second: Solution) -> Solution:
    """The cheaper answer; of equal ones the one that is proven closer. Without one, the word of the second."""
    if second.schedule is None:
        return first if first.schedule is not None else second
    if first.schedule is None or second.time_s < first.time_s * (1.0 - 1e-12):
        return second
    if second.time_s <= first.time_s * (1.0 + 1e-12) and second.bound_s > first.bound_s:
        return second
    return first
