"""Whenever memory is short, evict what is cheap to make again, large, and not read soon: fast, not optimal."""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

from planner.graph import Graph
from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.solvers.reruns import Rerun, schedule_of, without_useless


@dataclass(frozen=True)
class Eviction:
    """Dynamic rematerialization (Kirisame et al., ICLR 2021) with a known future: the score of a value is
    (seconds to make it again)^a / (bytes^b * (steps until it is read)^c), the smallest goes first.

    Attributes:
        time_limit_s: for all tries.
        tries: passes over the graph with different exponents; the first ones are fixed, the others random.
        seed: of the random ones.
    """

    name: ClassVar[str] = "eviction"

    time_limit_s: float = 10.0
    tries: int = 24
    seed: int = 0

    def solve(self, problem: Problem) -> Solution:
        """The cheapest of the tries that fit.

        Args:
            problem: graph, seconds, budget.

        Returns:
            A schedule within the budget, first runs in the given order, or `NOT_FOUND`; nothing is proven.
        """
        begin = time.perf_counter()
        best: tuple[float, Schedule] | None = None
        rng = random.Random(self.seed)
        for attempt in range(self.tries):
            if attempt and time.perf_counter() - begin > self.time_limit_s:
                break
            exponents = (
                _FIRST[attempt] if attempt < len(_FIRST) else tuple(rng.uniform(0.0, 2.0) for _ in "abc")
            )
            deadline = begin + (self.time_limit_s if attempt else max(self.time_limit_s, _FIRST_PASS_S))
            reruns = _Pass(problem, exponents).run(deadline)
            if reruns is None:
                continue
            kept = without_useless(problem, reruns, deadline=deadline)
            schedule = schedule_of(problem.costed.graph, kept)
            trace = simulate(problem, schedule)
            if trace.peak_bytes <= problem.budget_bytes and (best is None or trace.time_s < best[0]):
                best = trace.time_s, schedule
        return Solution(
            status=Status.NOT_FOUND if best is None else Status.FEASIBLE,
            schedule=None if best is None else best[1],
            time_s=float("inf") if best is None else best[0],
            bound_s=problem.costed.step_s,
            solve_s=time.perf_counter() - begin,
            solver=self.name,
        )


# The first pass may take this long where the limit is shorter.
_FIRST_PASS_S = 0.3
_FIRST = (
    (1.0, 1.0, 1.0),
    (0.5, 1.0, 1.0),
    (1.0, 1.0, 0.0),
    (1.0, 0.5, 1.0),
    (0.0, 1.0, 1.0),
    (0.0, 0.0, 1.0),
)


class _Pass:
    """One pass over the graph under a hard budget."""

    def __init__(self, problem: Problem, exponents: tuple[float, ...]) -> None:
        self.problem = problem
        self.graph = problem.costed.graph
        self.room = problem.budget_bytes - problem.static.resident_bytes
        self.seconds = problem.costed.time_s
        self.smallest_s = (problem.costed.step_s or 1.0) * 1e-9
        self.exponents = exponents
        self.size = [value.size_bytes for value in self.graph.values]
        self.stays = [
            value.is_held or value.first_run_only or not self.graph.nodes[value.node].can_rematerialize
            for value in self.graph.values
        ]
        self.last_need = _last_needs(self.graph)
        self.resident: set[int] = set()
        self.live = 0

    def run(self, deadline: float) -> frozenset[Rerun] | None:
        """What runs again, or None where a stage does not fit or the time is up."""
        graph = self.graph
        reruns: set[Rerun] = set()
        for t in range(len(graph.nodes)):
            if time.perf_counter() > deadline:
                return None
            runs = [*self._missing(t), t]
            left: dict[int, int] = {}
            for k in runs:
                for v in graph.nodes[k].inputs:
                    left[v] = left.get(v, 0) + 1
            for k in runs:
                made = [
                    v
                    for v in graph.nodes[k].outputs
                    if v not in self.resident and (k == t or not graph.values[v].first_run_only)
                ]
                needed = sum(self.size[v] for v in made) + graph.nodes[k].workspace_bytes
                if not self._make_room(needed, t, left):
                    return None
                if k != t:
                    reruns.add((t, k))
                self.resident.update(made)
                self.live += sum(self.size[v] for v in made)
                for v in graph.nodes[k].inputs:
                    left[v] -= 1
                for v in {*graph.nodes[k].inputs, *made}:
                    if not left.get(v) and self._is_over(v, t):
                        self._drop(v)
        return frozenset(reruns)

    def _missing(self, t: int) -> list[int]:
        """Nodes to run again so that the inputs of t are there, in order."""
        graph = self.graph
        again: set[int] = set()
        stack = [v for v in graph.nodes[t].inputs if v not in self.resident]
        while stack:
            k = graph.values[stack.pop()].node
            if k not in again:
                again.add(k)
                stack.extend(v for v in graph.nodes[k].inputs if v not in self.resident)
        return sorted(again)

    def _next_use(self, v: int, t: int) -> int | None:
        """First run after stage t that reads v."""
        users = self.graph.users[v]
        at = bisect_right(users, t)
        return users[at] if at < len(users) else None

    def _is_over(self, v: int, t: int) -> bool:
        """Nothing reads v after stage t; what cannot be made again may still be asked for by a rerun."""
        if self.graph.values[v].is_held:
            return False
        return self.last_need[v] <= t if self.stays[v] else self._next_use(v, t) is None

    def _drop(self, v: int) -> None:
        self.resident.discard(v)
        self.live -= self.size[v]

    def _make_room(self, needed: int, t: int, left: dict[int, int]) -> bool:
        """Evict until `needed` bytes fit; values that this stage still reads stay."""
        if self.live + needed <= self.room:
            return True
        a, b, c = self.exponents
        scores = []
        for v in self.resident:
            if self.stays[v] or left.get(v) or not self.size[v]:
                continue
            next_use = self._next_use(v, t)
            if next_use is None:
                next_use = 2 * len(self.graph.nodes)
            score = self._again_s(v) ** a / (self.size[v] ** b * (next_use - t) ** c)
            scores.append((score, v))
        scores.sort()
        for _, v in scores:
            self._drop(v)
            if self.live + needed <= self.room:
                return True
        return False

    def _again_s(self, v: int) -> float:
        """Seconds to make v again from what is there."""
        graph = self.graph
        total = self.smallest_s
        seen: set[int] = set()
        stack = [graph.values[v].node]
        while stack:
            k = stack.pop()
            if k in seen:
                continue
            seen.add(k)
            total += self.seconds[k]
            if len(seen) > 200:
                break
            stack.extend(graph.values[u].node for u in graph.nodes[k].inputs if u not in self.resident)
        return total


def _last_needs(graph: Graph) -> list[int]:
    """For each value the last stage in which it may be read: by a first run, or by a rerun for a later reader."""
    last = [value.node for value in graph.values]
    for k in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[k]
        latest = k
        if node.can_rematerialize:
            latest = max([k, *(last[v] for v in node.outputs)])
        for v in node.inputs:
            last[v] = max(last[v], latest)
    return last
