"""Every schedule of a tiny graph: a shortest path over what has run and what is there."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from planner.just_in_time import schedule_of_order
from planner.order import predecessors
from planner.problem import Problem
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.solvers.bounds import least_need_bytes

# What has run (one bit a node), what is there (one bit a value).
_State = tuple[int, int]


@dataclass(frozen=True)
class Exhaustive:
    """Dijkstra's algorithm; the answer is the optimum over all schedules, however often and in whatever order
    nodes run again.

    Attributes:
        time_limit_s: for the whole search.
        most_nodes: larger graphs are not tried.
        free_order: nodes first run in any order within their phase, else in the graph's.
    """

    name: ClassVar[str] = "exhaustive"

    time_limit_s: float = 20.0
    most_nodes: int = 12
    free_order: bool = False

    def solve(self, problem: Problem) -> Solution:
        """The optimum, or the proof that there is no schedule; `NOT_FOUND` for larger graphs and out of time.

        Args:
            problem: graph, seconds, budget.
        """
        begin = time.perf_counter()
        status, order = Status.NOT_FOUND, None
        if least_need_bytes(problem, free_order=self.free_order) > problem.budget_bytes:
            status = Status.INFEASIBLE
        elif len(problem.costed.graph.nodes) <= self.most_nodes:
            search = _Search(problem, free_order=self.free_order)
            status, order = search.run(begin + self.time_limit_s)
        schedule = schedule_of_order(problem.costed.graph, order) if order is not None else None
        time_s = simulate(problem, schedule).time_s if schedule is not None else float("inf")
        return Solution(
            status=status,
            schedule=schedule,
            time_s=time_s,
            bound_s=time_s if schedule is not None else problem.costed.step_s,
            solve_s=time.perf_counter() - begin,
            solver=self.name,
        )


class _Search:
    """The graph as bits, and the shortest path."""

    def __init__(self, problem: Problem, *, free_order: bool) -> None:
        graph = problem.costed.graph
        self.seconds = problem.costed.time_s
        self.room = problem.budget_bytes - problem.static.resident_bytes
        self.size = [value.size_bytes for value in graph.values]
        self.droppable = [v for v, value in enumerate(graph.values) if not value.is_held]
        self.nodes = graph.nodes
        self.inputs = [_bits(node.inputs) for node in graph.nodes]
        self.made = [_bits(node.outputs) for node in graph.nodes]
        self.again = [
            _bits(v for v in node.outputs if not graph.values[v].first_run_only) for node in graph.nodes
        ]
        if free_order:
            phases = [
                _bits(j for j, other in enumerate(graph.nodes) if other.phase is node.phase)
                for node in graph.nodes
            ]
            self.before = [
                _bits(row) | (((1 << k) - 1) & ~phases[k]) for k, row in enumerate(predecessors(graph))
            ]
        else:
            self.before = [(1 << k) - 1 for k in range(len(graph.nodes))]

    def run(self, deadline: float) -> tuple[Status, list[int] | None]:
        """Status, and the nodes in the order in which they run."""
        everything = (1 << len(self.nodes)) - 1
        begin: _State = (0, 0)
        reached: dict[_State, float] = {begin: 0.0}
        came: dict[_State, tuple[_State, int | None]] = {}
        queue: list[tuple[float, _State]] = [(0.0, begin)]
        popped = 0
        while queue:
            time_s, state = heapq.heappop(queue)
            if reached[state] < time_s:
                continue
            if state[0] == everything:
                return Status.OPTIMAL, _path(came, state)
            popped += 1
            if popped % 256 == 0 and time.perf_counter() > deadline:
                return Status.NOT_FOUND, None
            for added_s, following, node in self._steps(state):
                total_s = time_s + added_s
                if total_s < reached.get(following, float("inf")):
                    reached[following] = total_s
                    came[following] = (state, node)
                    heapq.heappush(queue, (total_s, following))
        return Status.INFEASIBLE, None

    def _steps(self, state: _State) -> list[tuple[float, _State, int | None]]:
        """Drop one value, or run one node."""
        ran, there = state
        steps: list[tuple[float, _State, int | None]] = [
            (0.0, (ran, there & ~(1 << v)), None) for v in self.droppable if there >> v & 1
        ]
        live = sum(size for v, size in enumerate(self.size) if there >> v & 1)
        for k, node in enumerate(self.nodes):
            is_first = not ran >> k & 1
            if self.inputs[k] & ~there or (is_first and self.before[k] & ~ran):
                continue
            if not is_first and not node.can_rematerialize:
                continue
            made = self.made[k] if is_first else self.again[k]
            needed = sum(size for v, size in enumerate(self.size) if made >> v & 1)
            if live + needed + node.workspace_bytes <= self.room:
                steps.append((self.seconds[k], (ran | 1 << k, there | made), k))
        return steps


def _bits(indices: Iterable[int]) -> int:
    """One bit for each index."""
    bits = 0
    for index in indices:
        bits |= 1 << index
    return bits


def _path(came: dict[_State, tuple[_State, int | None]], state: _State) -> list[int]:
    """The nodes that ran on the way to a state."""
    order: list[int] = []
    while state in came:
        state, node = came[state]
        if node is not None:
            order.append(node)
    return order[::-1]
