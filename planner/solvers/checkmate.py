"""Checkmate's published MILP, and its two-phase rounding of the linear relaxation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.just_in_time import schedule_of_order
from planner.problem import Problem
from planner.solution import Solution
from planner.solvers.bounds import least_need_bytes
from planner.solvers.checkmate_model import CheckmateModel, TooLargeError, num_rows
from planner.solvers.incumbent import Incumbent
from planner.solvers.sequences import order_of_stages

# A row takes about 1.5 kB in PuLP and HiGHS together, and 40 microseconds to write.
_MOST_ROWS = 1_200_000
_ROW_S = 4e-5
# Allowances that the rounding takes off the budget, and thresholds at which it rounds, the paper's own first.
_ALLOWANCES = (0.1, 0.0, 0.2, 0.05, 0.3, 0.4)
_THRESHOLDS = (0.5, 0.3, 0.7, 0.1, 0.9, 0.01)


@dataclass(frozen=True)
class Checkmate:
    """One stage per node; each stage may run any earlier node again (frontier advancing).

    The model has O(n^2) binaries; a graph whose model cannot be written in time is answered with `NOT_FOUND`.

    Attributes:
        time_limit_s: for writing and solving.
        gap: asked share of the step's time that may stay unproven.
        threads: of HiGHS.
        rounding: solve the relaxation under a smaller budget and round it, in place of the MILP.

    Reference: Jain et al., 2020, Checkmate: breaking the memory wall with optimal tensor rematerialization, MLSys.
    """

    name: ClassVar[str] = "checkmate"

    time_limit_s: float = 60.0
    gap: float = 0.0
    threads: int = 2
    rounding: bool = False

    def solve(self, problem: Problem) -> Solution:
        """Least time over every schedule in the graph's order, or a rounding of it.

        Args:
            problem: any graph in topological order, with a backward phase or without.

        Returns:
            A schedule that `simulate` accepts within the budget, or the reason why there is none.
        """
        best = Incumbent(problem, solver=self.name)
        best.offer(schedule_of_order(problem.costed.graph, range(len(problem.costed.graph.nodes))))
        too_small = least_need_bytes(problem) > problem.budget_bytes
        rows = num_rows(problem)
        if best.schedule or too_small or rows > _MOST_ROWS or rows * _ROW_S > self.time_limit_s:
            return best.answer(gap=self.gap)
        try:
            model = CheckmateModel(problem, check=lambda: self._check(best))
        except TooLargeError:
            return best.answer(gap=self.gap)
        infeasible = self._round(model, best) if self.rounding else self._search(model, best)
        return best.answer(infeasible=infeasible, gap=self.gap)

    def _search(self, model: CheckmateModel, best: Incumbent) -> bool:
        """Solve the MILP; whether it is proven infeasible. What the solver's tolerance let pass lowers the cap."""
        problem = best.problem
        cap_bytes = float(problem.budget_bytes)
        while self._remaining_s(best) > 0.0 and cap_bytes > 0.0:
            outcome = model.run(
                relaxed=False,
                cap_bytes=cap_bytes,
                time_limit_s=self._remaining_s(best),
                abs_gap_s=max(self.gap, 1e-9) * problem.costed.step_s,
                threads=self.threads,
            )
            # A lowered cap restricts the model: what it proves then counts no longer.
            if cap_bytes == problem.budget_bytes:
                if outcome.infeasible:
                    return True
                best.bound_s = max(best.bound_s, problem.costed.step_s + outcome.bound * model.time_scale)
            if not outcome.has_values:
                return False
            excess = best.offer(schedule_of_order(problem.costed.graph, model.order()))
            if not excess:
                return False
            cap_bytes -= excess
        return False

    def _round(self, model: CheckmateModel, best: Incumbent) -> bool:
        """Round relaxations under several allowances; whether the relaxation itself is infeasible."""
        problem = best.problem
        for allowance in _ALLOWANCES:
            if self._remaining_s(best) <= 0.0:
                break
            dynamic = problem.budget_bytes - problem.static.resident_bytes
            outcome = model.run(
                relaxed=True,
                cap_bytes=problem.budget_bytes - allowance * dynamic,
                time_limit_s=self._remaining_s(best),
                abs_gap_s=0.0,
                threads=self.threads,
            )
            if allowance == 0.0:
                if outcome.infeasible:
                    return True
                best.bound_s = max(best.bound_s, problem.costed.step_s + outcome.bound * model.time_scale)
            if not outcome.optimal:
                continue
            for threshold in _THRESHOLDS:
                order = order_of_stages(problem.costed.graph, model.retained(threshold))
                best.offer(schedule_of_order(problem.costed.graph, order))
        return False

    def _remaining_s(self, best: Incumbent) -> float:
        return self.time_limit_s - best.elapsed_s()

    def _check(self, best: Incumbent) -> None:
        if self._remaining_s(best) <= 0.0:
            raise TooLargeError
