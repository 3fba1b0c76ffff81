"""Stage-sparse Checkmate: values are made again several times; large graphs are solved part by part."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.solvers.bounds import least_need_bytes
from planner.solvers.reruns import Rerun, reruns_of, rows_bytes, schedule_of, without_useless
from planner.solvers.staged_candidates import binding_stages
from planner.solvers.staged_model import StagedModel
from planner.solvers.staged_neighbourhoods import Neighbourhoods
from planner.solvers.staged_rounds import Rounds

_DEPTHS = (1, 2, 4, 8, 16)
# Every earlier node is a candidate: Checkmate's own choice. For graphs of so many pairs of nodes.
_EVERY = 10**9
_MOST_PAIRS, _FEW_PAIRS = 6_000, 1_500
# Whole models beyond this many binaries are left to neighbourhoods.
_MOST_BINARIES, _MOST_CANDIDATES = 40_000, 200_000
# So many are written into a model in a second; with less time there is none.
_CANDIDATES_PER_S = 20_000
_ROUNDING = 1e-9
# Neighbourhoods in a row without a better answer, before the search ends.
_PATIENCE = 24


@dataclass(frozen=True)
class Staged:
    """Before each first run, nodes near its inputs may run again, as often as it pays.

    Attributes:
        time_limit_s: for the whole search.
        gap: asked share of the step's time that may stay unproven.
        threads: of HiGHS.
        seed: of the choice of neighbourhoods.
    """

    name: ClassVar[str] = "staged"

    time_limit_s: float = 60.0
    gap: float = 0.0
    threads: int = 2
    seed: int = 0

    def solve(self, problem: Problem, start: Schedule | None = None) -> Solution:
        """Search for the cheapest schedule within the budget, first runs in the given order.

        Args:
            problem: graph, seconds, budget, static memory.
            start: a schedule to begin with; it need not fit the budget.

        Returns:
            A schedule that `simulate` accepts within the budget, or the reason why there is none. The bound is
            that of this formulation at the greatest depth whose relaxation was solved.
        """
        begin = time.perf_counter()
        search = _Search(problem, begin + self.time_limit_s, self)
        status = search.run(start)
        schedule = schedule_of(problem.costed.graph, search.best) if search.best is not None else None
        time_s = float("inf")
        if schedule is not None:
            trace = simulate(problem, schedule)
            assert trace.peak_bytes <= problem.budget_bytes, "the judge rejects the stages' memory rows"
            time_s = trace.time_s
        return Solution(
            status=status,
            schedule=schedule,
            time_s=time_s,
            bound_s=min(search.bound_s, time_s),
            solve_s=time.perf_counter() - begin,
            solver=self.name,
        )


class _Search:
    """State of one search.

    Attributes:
        best: reruns of the cheapest schedule within the budget, or None.
        bound_s: seconds of the step that no schedule of the formulation goes below.
    """

    def __init__(self, problem: Problem, deadline: float, options: Staged) -> None:
        self.problem = problem
        self.graph = problem.costed.graph
        self.deadline = deadline
        self.options = options
        self.abs_gap_s = max(options.gap, _ROUNDING) * problem.costed.step_s
        self.rounds = Rounds(problem, options.threads)
        self.around = Neighbourhoods(problem, self.rounds, self.abs_gap_s, random.Random(options.seed))
        self.best: frozenset[Rerun] | None = None
        self.bound_s = problem.costed.step_s
        # Some whole model was solved to the end: `bound_s` is of the deepest of those.
        self.is_bounded = False
        self.is_infeasible = False
        # Of the last whole model.
        self.depth = 1

    def remaining_s(self) -> float:
        """Seconds left."""
        return self.deadline - time.perf_counter()

    def extra_s(self, reruns: Iterable[Rerun]) -> float:
        """Seconds of the reruns."""
        return sum(self.problem.costed.time_s[k] for _, k in reruns)

    def run(self, start: Schedule | None) -> Status:
        """Repair, prove, improve; the answer is in `best` and `bound_s`."""
        if least_need_bytes(self.problem) > self.problem.budget_bytes:
            return Status.INFEASIBLE
        current = (reruns_of(self.graph, start) if start is not None else None) or frozenset()
        if not self._accept(current):
            self._accept(frozenset())
        is_settled = self._deepen(current)
        if self.best is None:
            return Status.INFEASIBLE if self.is_infeasible else Status.NOT_FOUND
        if not is_settled:
            self._improve()
            if self.remaining_s() > 0.0 and not self._is_proven():
                self._whole(self.depth, share=1.0)
        return Status.OPTIMAL if self._is_proven() else Status.FEASIBLE

    def _deepen(self, current: frozenset[Rerun]) -> bool:
        """Whole models of growing depth; True when a proven one adds nothing to that before it."""
        last_s = float("inf")
        least_depth = 4 if self.options.gap == 0.0 else 2
        count = len(self.graph.nodes)
        is_small = count * (count - 1) // 2 <= (_MOST_PAIRS if self.options.gap == 0.0 else _FEW_PAIRS)
        is_settled = False
        for depth in _DEPTHS:
            if self.remaining_s() <= 0.0 or (is_small and depth > 4):
                break
            outcome = self._whole(depth)
            if self.best is None and (depth > 1 or outcome != "infeasible"):
                current = self.around.repaired(current, time.perf_counter() + 0.3 * self.remaining_s())
                self._accept(current)
            if outcome == "too large" or (outcome == "time" and self.best is not None):
                break
            if outcome == "optimal" and self.best is not None:
                reached_s = self.extra_s(self.best)
                if reached_s >= last_s - self.abs_gap_s and depth >= least_depth:
                    is_settled = True
                    break
                last_s = reached_s
        while self.best is None and not is_small and self.remaining_s() > 0.0:
            current = self.around.repaired(current, self.deadline)
            self._accept(current)
        if is_small and self.remaining_s() > 0.0:
            outcome = self._whole(_EVERY)
            self.is_infeasible = outcome == "infeasible"
            return outcome == "optimal"
        return is_settled

    def _is_proven(self) -> bool:
        if self.best is None:
            return False
        return self.problem.costed.step_s + self.extra_s(self.best) - self.bound_s <= self.abs_gap_s

    def _accept(self, reruns: frozenset[Rerun]) -> bool:
        """Keep a choice that fits and is cheaper than the best one."""
        rows = rows_bytes(self.problem, reruns)
        if max(rows.values()) > self.rounds.room:
            return False
        reruns = without_useless(self.problem, reruns, deadline=self.deadline)
        if self.best is None or self.extra_s(reruns) < self.extra_s(self.best) * (1.0 - 1e-12):
            self.best = reruns
        return True

    def _whole(self, depth: int, *, share: float = 0.3) -> str:
        """All candidates of a depth at once: "optimal", "infeasible", "time" or "too large".

        Args:
            depth: of the candidates.
            share: of the time that is left.
        """
        step_s = self.problem.costed.step_s
        near = self.around.candidates(depth, range(len(self.graph.nodes)))
        if len(near) > min(_MOST_CANDIDATES, _CANDIDATES_PER_S * self.remaining_s()):
            return "too large"
        free = self._useful(sorted({*near, *(self.best or ())}))
        if len(free) > _MOST_BINARIES:
            return "too large"
        self.depth = depth
        model = StagedModel(self.problem, free)
        outcome = self.rounds.solve(
            model,
            deadline=min(self.deadline, time.perf_counter() + max(1.0, share * self.remaining_s())),
            start=self.best,
            abs_gap_s=self.abs_gap_s,
        )
        if outcome.answer is not None:
            self._accept(outcome.answer)
        best_s = step_s + self.extra_s(self.best or ())
        # A deeper model that ran out of time says nothing new of an answer that the last one proved.
        is_news = self.best is None or best_s < self.bound_s - _ROUNDING * step_s
        if outcome.is_proven or is_news or not self.is_bounded:
            self.bound_s = max(step_s, step_s + outcome.bound * model.time_scale)
        self.is_bounded |= outcome.is_proven
        if outcome.is_infeasible:
            return "infeasible"
        return "optimal" if outcome.is_proven else "time"

    def _improve(self) -> None:
        """One neighbourhood after the other, until none is better for long."""
        failures = 0
        while self.remaining_s() > 0.0 and failures < _PATIENCE:
            assert self.best is not None
            before_s = self.extra_s(self.best)
            answer = self.around.better(self.best, self.deadline)
            if answer is not None and answer != self.best:
                self._accept(answer)
            failures = 0 if self.extra_s(self.best) < before_s * (1.0 - 1e-9) else failures + 1

    def _useful(self, candidates: list[Rerun]) -> list[Rerun]:
        """Those for which memory could bind between the node and its rerun."""
        while True:
            count = np.concatenate(([0], np.cumsum(binding_stages(self.problem, candidates))))
            kept = [(t, k) for t, k in candidates if count[t] > count[k]]
            if len(kept) == len(candidates):
                return kept
            candidates = kept
