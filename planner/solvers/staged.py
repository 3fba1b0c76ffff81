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
from planner.solvers.staged_model import StagedModel, nearby

_DEPTHS = (1, 2, 4, 8, 16)
# Every earlier node is a candidate: Checkmate's own choice. For graphs of so many pairs of nodes.
_EVERY = 10**9
_MOST_PAIRS, _FEW_PAIRS = 6_000, 1_500
# Whole models beyond this many binaries are left to neighbourhoods.
_MOST_BINARIES = 40_000
_ROUNDING = 1e-9
_IMPROVE_DEPTH = 4
# Binaries of a neighbourhood; adapted so that each takes a second or some.
_NEIGHBOURHOOD, _SMALLEST_NEIGHBOURHOOD, _LARGEST_NEIGHBOURHOOD = 300, 50, 5000
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
        search = StagedSearch(problem, begin + self.time_limit_s, self)
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


class StagedSearch:
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
        self.room = problem.budget_bytes - problem.static.resident_bytes
        self.best: frozenset[Rerun] | None = None
        self.bound_s = problem.costed.step_s
        self.rng = random.Random(options.seed)
        # Memory rows of reruns that some answer broke.
        self.tight: set[Rerun] = set()
        self.proved_infeasible = False
        # Some whole model was solved to the end: `bound_s` is of the deepest of those.
        self.is_bounded = False
        # Of the last whole model.
        self.depth = 1
        self.near: dict[int, list[list[int]]] = {}
        self.abs_gap_s = max(options.gap, _ROUNDING) * problem.costed.step_s

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
            return Status.INFEASIBLE if self.proved_infeasible else Status.NOT_FOUND
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
                current = self._repair(current)
            if outcome in ("too large", "time"):
                break
            if outcome == "optimal" and self.best is not None:
                reached_s = self.extra_s(self.best)
                if reached_s >= last_s - self.abs_gap_s and depth >= least_depth:
                    is_settled = True
                    break
                last_s = reached_s
        if is_small and self.remaining_s() > 0.0:
            outcome = self._whole(_EVERY)
            self.proved_infeasible = outcome == "infeasible"
            return outcome == "optimal"
        return is_settled

    def _is_proven(self) -> bool:
        if self.best is None:
            return False
        return self.problem.costed.step_s + self.extra_s(self.best) - self.bound_s <= self.abs_gap_s

    def _accept(self, reruns: frozenset[Rerun]) -> bool:
        """Keep a choice that fits and is cheaper than the best one."""
        rows = rows_bytes(self.graph, reruns)
        if max(rows.values()) > self.room:
            return False
        reruns = without_useless(self.problem, reruns)
        if self.best is None or self.extra_s(reruns) < self.extra_s(self.best) - 1e-15:
            self.best = reruns
        return True

    def _candidates(self, depth: int, stages: Iterable[int]) -> list[Rerun]:
        if depth not in self.near:
            self.near[depth] = nearby(self.problem, depth)
        return [(t, k) for t in stages for k in self.near[depth][t]]

    # -- one model --------------------------------------------------------------------------------------------

    def _solve(
        self,
        model: StagedModel,
        *,
        time_limit_s: float,
        start: frozenset[Rerun] | None,
        abs_gap_s: float,
        is_whole: bool = False,
    ) -> tuple[frozenset[Rerun] | None, bool]:
        """Rows where memory binds, first for the relaxation, then for whole answers.

        Returns:
            (the answer or None, it is proven to be the model's best).
        """
        deadline = min(self.deadline, time.perf_counter() + time_limit_s)
        gap = abs_gap_s / model.time_scale
        mip = False
        for t, k in self.tight:
            if t != k and ((t, k) in model.rerun or (t, k) in model.fixed):
                model.write_rerun(t, k)
        answer: frozenset[Rerun] | None = None
        while True:
            left = deadline - time.perf_counter()
            if left <= 0.0:
                return answer, False
            outcome = model.model.solve(
                mip=mip,
                time_limit_s=left,
                abs_gap=gap,
                threads=self.options.threads,
                start=model.start_at(start) if start is not None else None,
            )
            if outcome.infeasible:
                self.was_infeasible = True
                return None, True
            if is_whole and np.isfinite(outcome.bound):
                fixed_s = self.extra_s(model.fixed)
                self.depth_bound_s = max(
                    self.depth_bound_s,
                    self.problem.costed.step_s + fixed_s + outcome.bound * model.time_scale,
                )
            if not outcome.has_values:
                return answer, False
            if not mip:
                if not self._add_first_runs(model):
                    mip = True
                continue
            chosen = model.chosen()
            rows = rows_bytes(self.graph, chosen)
            over = {run for run, size in rows.items() if size > self.room}
            if not over or model.elastic:
                answer = chosen
            fresh = over - model.written
            if not fresh:
                return answer, outcome.optimal and (not over or model.elastic)
            for t in {t for t, _ in fresh}:
                if (t, t) in fresh:
                    model.write_first_run(t)
                for k in model.stage[t]:
                    if (t, k) not in model.written:
                        self.tight.add((t, k))
                        model.write_rerun(t, k)

    def _add_first_runs(self, model: StagedModel) -> int:
        """Write the worst rows above the room that are not there yet, some in each stretch; how many."""
        units = model.first_run_units(model.model.values)
        room = model.room / model.byte_scale
        over = units > room * (1.0 + 1e-9)
        for t, k in model.written:
            if t == k:
                over[t] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([False], over, [False])).astype(np.int8)))
        worst: set[int] = set()
        for first, stop in zip(edges[::2], edges[1::2], strict=True):
            for part in np.array_split(np.arange(first, stop), min(8, stop - first)):
                worst.add(int(part[np.argmax(units[part])]))
        for t in sorted(worst, key=lambda t: -units[t])[:40]:
            model.write_first_run(t)
        return len(worst)

    # -- the whole graph --------------------------------------------------------------------------------------

    def _whole(self, depth: int, *, share: float = 0.3) -> str:
        """All candidates of a depth at once: "optimal", "infeasible", "time" or "too large".

        Args:
            depth: of the candidates.
            share: of the time that is left.
        """
        near = self._candidates(depth, range(len(self.graph.nodes)))
        free = self._useful(sorted({*near, *(self.best or ())}))
        if len(free) > _MOST_BINARIES:
            return "too large"
        self.depth = depth
        model = StagedModel(self.problem, free)
        self.was_infeasible, self.depth_bound_s = False, 0.0
        start = self.best
        answer, proven = self._solve(
            model,
            time_limit_s=max(1.0, 0.3 * self.remaining_s()),
            start=start,
            abs_gap_s=self.abs_gap_s,
            is_whole=True,
        )
        if answer is not None:
            self._accept(answer)
        best_s = self.problem.costed.step_s + (self.extra_s(self.best) if self.best is not None else 0.0)
        if proven or self.best is None or best_s < self.bound_s - _ROUNDING * self.problem.costed.step_s:
            # A deeper model that ran out of time says nothing new of an answer that the last one proved.
            self.bound_s = max(self.problem.costed.step_s, self.depth_bound_s)
        elif not self.is_bounded:
            self.bound_s = max(self.problem.costed.step_s, self.depth_bound_s)
        self.is_bounded |= proven
        if self.was_infeasible:
            return "infeasible"
        return "optimal" if proven else "time"

    def _useful(self, candidates: list[Rerun]) -> list[Rerun]:
        """Those for which memory could bind between the node and its rerun."""
        while True:
            model = StagedModel(self.problem, candidates)
            count = np.concatenate(([0], np.cumsum(model.binding())))
            kept = [(t, k) for t, k in candidates if count[t] > count[k]]
            if len(kept) == len(candidates):
                return kept
            candidates = kept

    # -- neighbourhoods ---------------------------------------------------------------------------------------

    def _repair(self, current: frozenset[Rerun]) -> frozenset[Rerun]:
        """Lower the excess of a schedule that does not fit, around where it is worst."""
        size, depth, failures = 200, 2, 0
        rows = rows_bytes(self.graph, current)
        excess = _excess(rows, self.room)
        deadline = time.perf_counter() + 0.3 * self.remaining_s()
        while time.perf_counter() < deadline and failures < 8:
            over = [run for run, bytes_ in rows.items() if bytes_ > self.room]
            worst = max(over, key=lambda run: rows[run]) if failures == 0 else self.rng.choice(over)
            answer = self._solve_around(
                current, self._across(worst[0], size, depth), depth=depth, elastic=True
            )
            changed = False
            if answer is not None and answer != current:
                found = rows_bytes(self.graph, answer)
                if _excess(found, self.room) < excess * (1.0 - 1e-9):
                    current, rows, excess, changed = answer, found, _excess(found, self.room), True
            if excess == 0.0:
                self._accept(current)
                return current
            failures = 0 if changed else failures + 1
            if self.trace:
                print(
                    f"repair {size=} {depth=} {excess / self.room:.3f} {worst} {len(over)=} {failures}",
                    answer is None,
                    self.remaining_s(),
                )
            if failures and failures % 2 == 0:
                size, depth = min(size * 2, 3000), min(depth * 2, 16)
        return current

    def _improve(self) -> None:
        """Free the reruns of some stages, solve, keep what is better, until nothing is for long."""
        assert self.best is not None
        count = len(self.graph.nodes)
        candidates = sorted({*self._candidates(_IMPROVE_DEPTH, range(count)), *self.best})
        binding = StagedModel(self.problem, candidates).binding()
        self.binding_before = np.concatenate(([0], np.cumsum(binding)))
        size, failures = _NEIGHBOURHOOD, 0
        while self.remaining_s() > 0.0 and failures < _PATIENCE:
            before_s, begin = self.extra_s(self.best), time.perf_counter()
            choose = self._across if self.rng.random() < 0.5 else self._window
            stages = choose(self.rng.randrange(count), size, _IMPROVE_DEPTH)
            answer = self._solve_around(self.best, stages, depth=_IMPROVE_DEPTH, elastic=False)
            if answer is not None and answer != self.best:
                self._accept(answer)
            took_s = time.perf_counter() - begin
            if took_s < 1.0:
                size = min(int(size * 1.2) + 1, _LARGEST_NEIGHBOURHOOD)
            elif took_s > 3.0:
                size = max(int(size * 0.7), _SMALLEST_NEIGHBOURHOOD)
            better = self.extra_s(self.best) < before_s * (1.0 - 1e-9)
            failures = 0 if better else failures + 1
            if self.trace:
                print(f"{size=} {took_s=:.1f} {before_s:.4f} -> {self.extra_s(self.best):.4f} {failures}")

    trace = False

    def _solve_around(
        self, current: frozenset[Rerun], stages: set[int], *, depth: int, elastic: bool
    ) -> frozenset[Rerun] | None:
        """Decide anew what runs again in some stages; everything else stays."""
        candidates = set(self._candidates(depth, sorted(stages)))
        free = candidates | {run for run in current if run[0] in stages}
        if not elastic:
            free = {(t, k) for t, k in free if self.binding_before[t] > self.binding_before[k]}
            free |= {run for run in current if run[0] in stages}
        if not free:
            return None
        model = StagedModel(self.problem, free, current - free, elastic=elastic)
        answer, _ = self._solve(model, time_limit_s=4.0, start=current, abs_gap_s=self.abs_gap_s)
        return answer

    def _across(self, t: int, size: int, depth: int) -> set[int]:
        """Stages in which values that are there at stage t are read next."""
        stages: set[int] = set()
        found = 0
        waiting = [
            v
            for v, value in enumerate(self.graph.values)
            if value.node < t and self.graph.users[v] and self.graph.users[v][-1] > t
        ]
        self.rng.shuffle(waiting)
        for v in waiting:
            stage = next(user for user in self.graph.users[v] if user > t)
            if stage not in stages:
                stages.add(stage)
                found += len(self._candidates(depth, [stage]))
            if found >= size:
                break
        return stages

    def _window(self, t: int, size: int, depth: int) -> set[int]:
        """Stages around stage t."""
        first = stop = t
        found = 0
        while found < size and (first > 0 or stop < len(self.graph.nodes)):
            if first > 0:
                first -= 1
                found += len(self._candidates(depth, [first]))
            if stop < len(self.graph.nodes):
                found += len(self._candidates(depth, [stop]))
                stop += 1
        return set(range(first, stop))


def _excess(rows: dict[Rerun, int], room: int) -> float:
    """Bytes above the room, summed over the runs."""
    return float(sum(bytes_ - room for bytes_ in rows.values() if bytes_ > room))
