"""A schedule as stages: every node runs first in the graph's order, and before each first run some run again."""

from __future__ import annotations

import time
from collections.abc import Iterable

from planner.graph import Graph
from planner.just_in_time import schedule_of_order
from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import simulate

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


def without_useless(problem: Problem, reruns: frozenset[Rerun], *, deadline: float) -> frozenset[Rerun]:
    """Leave out what nothing reads, and what can stay in memory instead within the budget.

    Args:
        problem: graph, seconds, budget.
        reruns: of a schedule that can be executed.
        deadline: of `time.perf_counter`; what was not tried by then stays.

    Returns:
        A subset that can be executed; its peak is within the budget if that of `reruns` was.
    """
    kept = _read_by_something(problem.costed.graph, reruns)
    return _retained_instead(problem, kept, deadline=deadline)


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


def _retained_instead(problem: Problem, reruns: frozenset[Rerun], *, deadline: float) -> frozenset[Rerun]:
    """Drop reruns one by one, the dearest first, where keeping their outputs from the run before fits."""
    graph = problem.costed.graph
    room = problem.budget_bytes - problem.static.resident_bytes
    current, rows = set(reruns), rows_bytes(problem, reruns)
    for t, k in sorted(reruns, key=lambda rerun: -problem.costed.time_s[rerun[1]]):
        if time.perf_counter() > deadline:
            break
        outputs = [v for v in graph.nodes[k].outputs if not graph.values[v].first_run_only]
        added = sum(graph.values[v].size_bytes for v in outputs)
        if _most_since_last_read(graph, rows, (t, k), outputs) + added > room:
            continue
        fewer = current - {(t, k)}
        without = rows_bytes(problem, fewer)
        if max(without.values()) <= room:
            current, rows = fewer, without
    return frozenset(current)


def _most_since_last_read(graph: Graph, rows: dict[Rerun, int], run: Rerun, outputs: list[int]) -> int:
    """Most bytes while nothing reads the outputs of a rerun, from their last use before it on."""
    readers = {user for v in outputs for user in graph.users[v]} | {run[1]}
    order = list(rows)
    most = 0
    for position in range(order.index(run) - 1, -1, -1):
        if order[position][1] in readers:
            break
        most = max(most, rows[order[position]])
    return most


def rows_bytes(problem: Problem, reruns: Iterable[Rerun]) -> dict[Rerun, int]:
    """What the judge finds there, static memory not included, while (t, k) runs; (t, t) is a first run."""
    reruns = list(reruns)
    order = sorted([*reruns, *((t, t) for t in range(len(problem.costed.graph.nodes)))])
    trace = simulate(problem, schedule_of(problem.costed.graph, reruns))
    resident = problem.static.resident_bytes
    return {run: now - resident for run, now in zip(order, trace.timeline_bytes, strict=True)}
