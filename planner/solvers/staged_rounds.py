"""A staged model solved in rounds: memory rows are written where an answer broke them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from planner.problem import Problem
from planner.solvers.reruns import Rerun, rows_bytes
from planner.solvers.staged_model import StagedModel

# New rows of one round, and of one stretch of stages above the room.
_MOST_ROWS, _ROWS_OF_A_STRETCH = 40, 8


@dataclass(frozen=True)
class RoundsOutcome:
    """What became of a model.

    Attributes:
        answer: reruns of the best answer that fits (of any answer of an elastic model), or None.
        is_proven: that nothing in the model is better, or that it has no answer at all.
        is_infeasible: the latter.
        bound: in the model's units of time, -inf if nothing is proven.
    """

    answer: frozenset[Rerun] | None
    is_proven: bool
    is_infeasible: bool
    bound: float


class Rounds:
    """Solves staged models of one graph; rows of reruns that bound once are written into all later models.

    Args:
        problem: graph, budget.
        threads: of HiGHS.
    """

    def __init__(self, problem: Problem, threads: int) -> None:
        self.problem = problem
        self.room = problem.budget_bytes - problem.static.resident_bytes
        self.threads = threads
        self.tight: set[Rerun] = set()

    def solve(
        self, model: StagedModel, *, deadline: float, start: frozenset[Rerun] | None, abs_gap_s: float
    ) -> RoundsOutcome:
        """First the relaxation until no row is broken, then whole answers until none is broken to the byte.

        Args:
            model: variables, needs, no memory rows yet.
            deadline: of `time.perf_counter`.
            start: a choice to begin with.
            abs_gap_s: seconds that may stay unproven.
        """
        gap = abs_gap_s / model.time_scale
        for t, k in self.tight:
            if (t, k) in model.rerun or (t, k) in model.fixed:
                model.write_rerun(t, k)
        answer: frozenset[Rerun] | None = None
        mip, bound = False, float("-inf")
        while True:
            left_s = deadline - time.perf_counter()
            if left_s <= 0.0:
                return RoundsOutcome(answer, False, False, bound)
            outcome = model.model.solve(
                mip=mip,
                time_limit_s=left_s,
                abs_gap=gap,
                threads=self.threads,
                start=model.start_at(start) if start is not None else None,
            )
            if outcome.infeasible:
                return RoundsOutcome(None, True, True, bound)
            if np.isfinite(outcome.bound):
                bound = max(bound, outcome.bound)
            if not outcome.has_values:
                return RoundsOutcome(answer, False, False, bound)
            if not mip:
                mip = not self._write_first_runs(model)
                continue
            chosen = model.chosen()
            over = {run for run, size in rows_bytes(self.problem, chosen).items() if size > self.room}
            fits = not over or model.elastic
            if fits:
                answer = chosen
            fresh = over - set(model.written)
            if fresh:
                self._write_stages(model, fresh)
            elif fits or not any([model.write_cover(run) for run in over]):
                return RoundsOutcome(answer, outcome.optimal and fits, False, bound)

    def _write_stages(self, model: StagedModel, broken: set[Rerun]) -> None:
        """Write the broken rows, and those of all reruns of their stages."""
        for t in sorted({t for t, _ in broken}):
            if (t, t) in broken:
                model.write_first_run(t)
            for k in model.stage[t]:
                if (t, k) not in model.written:
                    self.tight.add((t, k))
                    model.write_rerun(t, k)

    def _write_first_runs(self, model: StagedModel) -> bool:
        """Write the worst rows above the room that are not there yet, some in each stretch; were there any?"""
        units = model.first_run_units()
        over = units > model.room_units * (1.0 + 1e-9)
        over[[t for t, k in model.written if t == k]] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([False], over, [False])).astype(np.int8)))
        worst: set[int] = set()
        for first, stop in zip(edges[::2], edges[1::2], strict=True):
            for part in np.array_split(np.arange(first, stop), min(_ROWS_OF_A_STRETCH, stop - first)):
                worst.add(int(part[np.argmax(units[part])]))
        for t in sorted(worst, key=lambda t: -units[t])[:_MOST_ROWS]:
            model.write_first_run(t)
        return bool(worst)
