"""The materialization-time MILP: O(n) binaries, exact times, memory rows added where memory binds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from planner.just_in_time import just_in_time
from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import Trace, simulate
from planner.solution import Solution, Status
from planner.solvers.materialization_model import MaterializationModel

# The solver accepts rows that are violated by about 1e-6; the judge does not. Smaller excess is no new row.
_TOLERANCE = 1e-6
# Sums of seconds in another order differ by about this share.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Materialization:
    """Each value is retained, or dropped and made once more just before its first need in backward.

    Memory rows exist only at times where a solution without them passed the budget; when none does, the answer
    is that of the formulation with every row, and the bound of every round is valid.

    Attributes:
        time_limit_s: for the whole solve, all rounds together.
        gap: asked share of the step's time that may stay unproven.
        threads: of HiGHS.
    """

    name: ClassVar[str] = "materialization"

    time_limit_s: float = 20.0
    gap: float = 0.002
    threads: int = 2

    def solve(self, problem: Problem) -> Solution:
        """Find the cheapest choice within the budget.

        Args:
            problem: a training step, a budget, static memory.

        Returns:
            A schedule that `simulate` accepts within the budget, or the reason why there is none.
        """
        start = time.perf_counter()
        search = _Search(problem, start + self.time_limit_s, self.threads)
        status = search.cheapest(max(self.gap, _ROUNDING) * problem.costed.step_s)
        best = search.best
        time_s = best[0] if best is not None else float("inf")
        return Solution(
            status=status,
            schedule=best[1] if best is not None else None,
            time_s=time_s,
            bound_s=min(problem.costed.step_s + search.bound_s, time_s),
            solve_s=time.perf_counter() - start,
            solver=self.name,
        )

    def smallest_peak(self, problem: Problem) -> tuple[Schedule, Trace]:
        """The schedule of the formulation with the least peak that is found, whatever its time.

        Args:
            problem: its budget is not read.

        Returns:
            Schedule and its replay.
        """
        search = _Search(problem, time.perf_counter() + self.time_limit_s, self.threads)
        return search.flattest()


class _Search:
    """Rounds of solving one problem with more and more memory rows."""

    def __init__(self, problem: Problem, deadline: float, threads: int) -> None:
        self.problem = problem
        self.deadline = deadline
        self.threads = threads
        self.room_bytes = float(problem.budget_bytes - problem.static.resident_bytes)
        self.model = MaterializationModel(problem, cap_bytes=self.room_bytes)
        self.bound_s = 0.0
        self.best: tuple[float, Schedule] | None = None
        self.flattest_choice = self.model.constant_choice(0.0)

    def cheapest(self, abs_gap_s: float) -> Status:
        """Least extra time within the cap; the answer is in `best` and `bound_s`."""
        model = self.model
        fixed = model.windows.fixed_bytes.max(initial=0)
        if max(fixed, 0) > self.room_bytes or (
            self.problem.static.optimizer_step_peak_bytes > self.problem.budget_bytes
        ):
            return Status.INFEASIBLE
        if self.consider(model.constant_choice(1.0)):
            return Status.OPTIMAL
        model.minimize_time()
        self.add_violated(model.profile_bytes(model.constant_choice(1.0)))
        relaxed, incumbent = True, None
        # A cap lowered for the judge's sake restricts the model: bounds from then on prove nothing.
        while True:
            outcome = model.run(
                relaxed=relaxed,
                time_limit_s=self.remaining_s(),
                abs_gap=0.5 * abs_gap_s / model.time_scale,
                threads=self.threads,
                incumbent=incumbent,
            )
            if outcome.infeasible and model.cap_bytes == self.room_bytes:
                return Status.INFEASIBLE
            if model.cap_bytes == self.room_bytes and np.isfinite(outcome.bound):
                self.bound_s = max(self.bound_s, outcome.bound * model.time_scale)
            if not outcome.has_values:
                break
            choice = model.choice() if relaxed else np.round(model.choice())
            added = self.add_violated(model.profile_bytes(choice))
            if relaxed:
                relaxed = added > 0 and self.remaining_s() > 0.0
                continue
            incumbent = choice
            accepted = self.consider(choice)
            if self.best is not None and self.unproven_s() <= abs_gap_s:
                return Status.OPTIMAL
            if added == 0 and (accepted or not self.tighten(choice)):
                break
            if self.remaining_s() <= 0.0:
                break
        if self.best is None:
            # The formulation's answers need more than it sees: its flattest one may still fit.
            flattest = _Search(self.problem, self.deadline, self.threads)
            flattest.flattest()
            self.consider(flattest.flattest_choice)
        if self.best is None:
            return Status.NOT_FOUND
        return Status.OPTIMAL if self.unproven_s() <= abs_gap_s else Status.FEASIBLE

    def flattest(self) -> tuple[Schedule, Trace]:
        """Least peak: the cap becomes the objective."""
        model = self.model
        model.cap_bytes = float("inf")
        model.minimize_peak()
        choice, reached_bytes, relaxed = model.constant_choice(0.0), 0.0, True
        bound_bytes = float(model.windows.fixed_bytes.max(initial=0))
        best: tuple[Schedule, Trace] | None = None
        while True:
            schedule = self.schedule_of(choice)
            trace = simulate(self.problem, schedule)
            if best is None or trace.peak_bytes < best[1].peak_bytes:
                best, self.flattest_choice = (schedule, trace), choice
            added = self.add_violated(model.profile_bytes(choice), cap_bytes=reached_bytes)
            reached = best[1].peak_bytes - self.problem.static.resident_bytes
            if (added == 0 and not relaxed) or self.remaining_s() <= 0.0 or reached <= 1.002 * bound_bytes:
                return best
            relaxed = relaxed and added > 0
            outcome = model.run(
                relaxed=relaxed,
                time_limit_s=self.remaining_s(),
                abs_gap=2e-3 * reached / model.byte_scale,
                threads=self.threads,
            )
            if not outcome.has_values:
                return best
            bound_bytes = max(bound_bytes, outcome.bound * model.byte_scale)
            reached_bytes = (model.cap.varValue or 0.0) * model.byte_scale
            choice = model.choice() if relaxed else np.round(model.choice())

    def remaining_s(self) -> float:
        """Seconds left."""
        return self.deadline - time.perf_counter()

    def unproven_s(self) -> float:
        """Seconds of the best schedule above the bound."""
        assert self.best is not None
        return self.best[0] - self.problem.costed.step_s - self.bound_s

    def schedule_of(self, choice: np.ndarray) -> Schedule:
        """Just-in-time schedule of a choice."""
        return just_in_time(self.problem.costed.graph, np.flatnonzero(choice > 0.5).tolist())

    def consider(self, choice: np.ndarray) -> bool:
        """Keep the choice, improved, if the judge accepts it."""
        schedule = self.schedule_of(choice)
        trace = simulate(self.problem, schedule)
        if trace.peak_bytes > self.problem.budget_bytes:
            return False
        schedule, time_s = self.polish(choice, schedule, trace.time_s)
        if self.best is None or time_s < self.best[0]:
            self.best = time_s, schedule
        return True

    def polish(self, choice: np.ndarray, schedule: Schedule, time_s: float) -> tuple[Schedule, float]:
        """Retain more where the judge allows it, the dearest to make again per byte first."""
        graph, node_s = self.problem.costed.graph, self.problem.costed.time_s
        dropped = [v for v in self.model.x if choice[v] < 0.5]
        dropped.sort(key=lambda v: -node_s[graph.values[v].node] / graph.values[v].size_bytes)
        choice = choice.copy()
        for v in dropped:
            if self.remaining_s() <= 0.0:
                break
            choice[v] = 1.0
            candidate = self.schedule_of(choice)
            trace = simulate(self.problem, candidate)
            if trace.peak_bytes <= self.problem.budget_bytes and trace.time_s <= time_s:
                schedule, time_s = candidate, trace.time_s
            else:
                choice[v] = 0.0
        return schedule, time_s

    def tighten(self, choice: np.ndarray) -> bool:
        """Lower the cap by what the formulation does not see: outputs that a second run makes in vain."""
        excess = simulate(self.problem, self.schedule_of(choice)).peak_bytes - self.problem.budget_bytes
        self.model.cap_bytes -= max(excess, 1)
        return self.model.cap_bytes > 0

    def add_violated(self, profile_bytes: np.ndarray, *, cap_bytes: float | None = None) -> int:
        """Add rows at the worst times above the cap, some in each stretch; how many were added."""
        cap = self.model.cap_bytes if cap_bytes is None else cap_bytes
        over = profile_bytes > cap + _TOLERANCE * self.model.byte_scale
        over[list(self.model.rows)] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([False], over, [False])).astype(np.int8)))
        worst: set[int] = set()
        for first, stop in zip(edges[::2], edges[1::2], strict=True):
            for part in np.array_split(np.arange(first, stop), min(8, stop - first)):
                worst.add(int(part[np.argmax(profile_bytes[part])]))
        chosen = sorted(worst, key=lambda t: -profile_bytes[t])[:24]
        for count, t in enumerate(chosen):
            if count and self.remaining_s() <= 0.0:
                return count
            self.model.add_row(t)
        return len(chosen)
