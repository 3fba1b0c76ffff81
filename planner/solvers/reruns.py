"""A schedule as stages: every node runs first in the graph's order, and before each first run some run again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.graph import Graph
from planner.just_in_time import schedule_of_order
from planner.problem import Problem
from planner.schedule import Schedule

# (t, k): node k runs again in stage t, which ends with the first run of node t.
Rerun = tuple[int, int]


def schedule_of(graph: Graph, reruns: Iterable[Rerun]) -> Schedule:
    """The instructions; within a stage nodes run again in the graph's order, values go after their last use."""
    order: list[int] = []
    waiting = sorted(reruns)
    position = 0
    for t in range(len(graph.nodes)):
        while position < len(waiting) and waiting[position][0] == t:
            order.append(waiting[position][1])
            position += 1
        order.append(t)
    return schedule_of_order(graph, order)


def reruns_of(graph: Graph, schedule: Schedule) -> frozenset[Rerun] | None:
    """What runs again in each stage; None if first runs are not in the graph's order."""
    reruns: set[Rerun] = set()
    pending: list[int] = []
    first = 0
    for node in schedule.node_order:
        if node == first:
            reruns.update((first, k) for k in pending)
            pending, first = [], first + 1
        elif node > first:
            return None
        else:
            pending.append(node)
    return frozenset(reruns) if first == len(graph.nodes) else None


def lasting_values(graph: Graph) -> set[int]:
    """Values that stay although their node runs again: held by the caller, or not made by a second run."""
    return {v for v, value in enumerate(graph.values) if value.is_held or value.first_run_only}


def without_useless(problem: Problem, reruns: frozenset[Rerun]) -> frozenset[Rerun]:
    """Leave out what nothing reads, and what can stay in memory instead within the budget.

    Args:
        problem: graph, seconds, budget.
        reruns: of a schedule that can be executed.

    Returns:
        A subset that can be executed; its peak is within the budget if that of `reruns` was.
    """
    kept = _read_by_something(problem.costed.graph, reruns)
    return _retained_instead(problem, kept)


def _read_by_something(graph: Graph, reruns: frozenset[Rerun]) -> frozenset[Rerun]:
    """Backward over the stages: a rerun stays if one of its outputs is read before its node runs again."""
    kept: set[Rerun] = set()
    by_stage: dict[int, list[int]] = {}
    for t, k in reruns:
        by_stage.setdefault(t, []).append(k)
    wanted: set[int] = set()
    for t in range(len(graph.nodes) - 1, -1, -1):
        wanted.update(graph.nodes[t].inputs)
        wanted.difference_update(graph.nodes[t].outputs)
        for k in sorted(by_stage.get(t, ()), reverse=True):
            made = [v for v in graph.nodes[k].outputs if not graph.values[v].first_run_only]
            if wanted.isdisjoint(made):
                continue
            kept.add((t, k))
            wanted.difference_update(made)
            wanted.update(graph.nodes[k].inputs)
    return frozenset(kept)


def _retained_instead(problem: Problem, reruns: frozenset[Rerun]) -> frozenset[Rerun]:
    """Drop reruns one by one, the dearest first, where keeping their outputs from the run before fits."""
    graph = problem.costed.graph
    room = problem.budget_bytes - problem.static.resident_bytes
    current = set(reruns)
    rows = _Rows(graph, current)
    for t, k in sorted(reruns, key=lambda rerun: -problem.costed.time_s[rerun[1]]):
        outputs = [v for v in graph.nodes[k].outputs if not graph.values[v].first_run_only]
        first, last = rows.gap(t, k, outputs)
        added = sum(graph.values[v].size_bytes for v in outputs)
        if first < last and rows.bytes[first:last].max() + added > room:
            continue
        current.remove((t, k))
        rows = _Rows(graph, current)
        if rows.bytes.max(initial=0) > room:
            current.add((t, k))
            rows = _Rows(graph, current)
    return frozenset(current)


def rows_bytes(graph: Graph, reruns: Iterable[Rerun]) -> dict[Rerun, int]:
    """Memory while each run (t, k) of a schedule runs, static memory not included; (t, t) is a first run."""
    rows = _Rows(graph, set(reruns))
    return dict(zip(rows.order, rows.bytes.tolist(), strict=True))


class _Rows:
    """Memory while each run of a schedule runs, static memory not included."""

    def __init__(self, graph: Graph, reruns: set[Rerun]) -> None:
        self.graph = graph
        self.order = sorted([(t, k) for t, k in reruns] + [(t, t) for t in range(len(graph.nodes))])
        self.position = {run: position for position, run in enumerate(self.order)}
        count = len(self.order)
        delta = np.zeros(count + 1, dtype=np.int64)
        last_use: dict[int, int] = {}
        lasting = lasting_values(graph)
        made_at: dict[int, int] = {}
        temporary = np.zeros(count, dtype=np.int64)
        for position, (t, k) in enumerate(self.order):
            node = graph.nodes[k]
            temporary[position] = node.workspace_bytes
            for v in node.inputs:
                last_use[v] = position
            for v in node.outputs:
                size = graph.values[v].size_bytes
                if t != k and graph.values[v].first_run_only:
                    continue
                if v in made_at and v in lasting:
                    temporary[position] += size
                    continue
                if v in made_at:
                    delta[last_use[v] + 1] -= size
                made_at[v] = last_use[v] = position
                delta[position] += size
        for v in made_at:
            last = count - 1 if graph.values[v].is_held else last_use[v]
            delta[last + 1] -= graph.values[v].size_bytes
        self.bytes = np.cumsum(delta[:-1]) + temporary

    def gap(self, t: int, k: int, outputs: list[int]) -> tuple[int, int]:
        """Positions after the last use of any of the outputs before (t, k), up to (t, k)."""
        here = self.position[t, k]
        readers = {user for v in outputs for user in self.graph.users[v]} | {k}
        position = here - 1
        while position >= 0 and self.order[position][1] not in readers:
            position -= 1
        return position + 1, here
