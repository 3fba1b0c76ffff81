"""Neighbourhoods of a staged schedule: the reruns of some stages are decided anew, the others stay."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import numpy as np

from planner.problem import Problem
from planner.solvers.reruns import Rerun, rows_bytes
from planner.solvers.staged_candidates import binding_stages, nearby
from planner.solvers.staged_model import StagedModel
from planner.solvers.staged_rounds import Rounds

# Seconds of one neighbourhood, and between which of them its size stays.
_LIMIT_S, _QUICK_S, _SLOW_S = 4.0, 1.0, 3.0
# Candidates of the first neighbourhood, the fewest, the most.
_FIRST, _FEWEST, _MOST = 300, 50, 5000
_FIRST_REPAIR, _MOST_REPAIR = 200, 3000
_DEPTH, _REPAIR_DEPTH, _DEEPEST = 4, 2, 16
# Repairs in a row without a lower excess, before the search is given up.
_REPAIRS = 8


class Neighbourhoods:
    """Chooses stages and solves what is free in them.

    Args:
        problem: graph, seconds, budget.
        rounds: solves the models.
        abs_gap_s: seconds that may stay unproven in each.
        rng: of the choice.
    """

    def __init__(self, problem: Problem, rounds: Rounds, abs_gap_s: float, rng: random.Random) -> None:
        self.problem = problem
        self.graph = problem.costed.graph
        self.rounds = rounds
        self.abs_gap_s = abs_gap_s
        self.rng = rng
        self.size = _FIRST
        self.near: dict[int, list[list[int]]] = {}

    def candidates(self, depth: int, stages: Iterable[int]) -> list[Rerun]:
        """What may run again in some stages, `depth` deep."""
        if depth not in self.near:
            self.near[depth] = nearby(self.problem, depth)
        return [(t, k) for t in stages for k in self.near[depth][t]]

    def better(self, current: frozenset[Rerun], deadline: float) -> frozenset[Rerun] | None:
        """The best in one neighbourhood of a schedule that fits; None where there is nothing to decide."""
        begin = time.perf_counter()
        choose = self._across if self.rng.random() < 0.5 else self._window
        stages = choose(self.rng.randrange(len(self.graph.nodes)), self.size, _DEPTH)
        in_stages = {run for run in current if run[0] in stages}
        free = in_stages | {
            (t, k) for t, k in self.candidates(_DEPTH, sorted(stages)) if self._may_bind(t, k)
        }
        answer = self._solve(current, free, elastic=False, deadline=deadline)
        took_s = time.perf_counter() - begin
        if took_s < _QUICK_S:
            self.size = min(int(self.size * 1.2) + 1, _MOST)
        elif took_s > _SLOW_S:
            self.size = max(int(self.size * 0.7), _FEWEST)
        return answer

    def repaired(self, current: frozenset[Rerun], deadline: float) -> frozenset[Rerun]:
        """A schedule with less memory above the room, as far as it goes: around where that is worst."""
        room = self.rounds.room
        size, depth, failures = _FIRST_REPAIR, _REPAIR_DEPTH, 0
        rows = rows_bytes(self.problem, current)
        while _excess(rows, room) and time.perf_counter() < deadline and failures < _REPAIRS:
            over = [run for run, bytes_ in rows.items() if bytes_ > room]
            worst = max(over, key=lambda run: rows[run]) if failures == 0 else self.rng.choice(over)
            stages = self._across(worst[0], size, depth)
            free = {run for run in current if run[0] in stages} | {*self.candidates(depth, sorted(stages))}
            answer = self._solve(current, free, elastic=True, deadline=deadline)
            found = rows if answer is None else rows_bytes(self.problem, answer)
            if answer is not None and _excess(found, room) < _excess(rows, room):
                current, rows, failures = answer, found, 0
                continue
            failures += 1
            if failures % 2 == 0:
                size, depth = min(size * 2, _MOST_REPAIR), min(depth * 2, _DEEPEST)
        return current

    def _solve(
        self, current: frozenset[Rerun], free: set[Rerun], *, elastic: bool, deadline: float
    ) -> frozenset[Rerun] | None:
        if not free:
            return None
        model = StagedModel(self.problem, free, current - free, elastic=elastic)
        until = min(deadline, time.perf_counter() + _LIMIT_S)
        return self.rounds.solve(model, deadline=until, start=current, abs_gap_s=self.abs_gap_s).answer

    def _may_bind(self, t: int, k: int) -> bool:
        """Memory could pass the room between node k and stage t."""
        if self._binding_before is None:
            stages = range(len(self.graph.nodes))
            binding = binding_stages(self.problem, self.candidates(_DEPTH, stages))
            self._binding_before = np.concatenate(([0], np.cumsum(binding)))
        return bool(self._binding_before[t] > self._binding_before[k])

    _binding_before: np.ndarray | None = None

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
                found += len(self.candidates(depth, [stage]))
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
                found += len(self.candidates(depth, [first]))
            if stop < len(self.graph.nodes):
                found += len(self.candidates(depth, [stop]))
                stop += 1
        return set(range(first, stop))


def _excess(rows: dict[Rerun, int], room: int) -> int:
    """Bytes above the room, summed over the runs."""
    return sum(bytes_ - room for bytes_ in rows.values() if bytes_ > room)
