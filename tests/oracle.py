"""Exhaustive optima for graphs of a few nodes, from the definition; they share nothing with any solver."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

from planner.just_in_time import just_in_time
from planner.problem import Problem
from planner.simulate import simulate


@dataclass(frozen=True)
class Best:
    """The cheapest just-in-time schedule within the budget, and the least peak of any.

    Attributes:
        time_s: of the cheapest; inf if none fits.
        smallest_peak_bytes: over all sets.
    """

    time_s: float
    smallest_peak_bytes: int


def best_just_in_time(problem: Problem) -> Best:
    """Try every set of retained forward values with the judge."""
    graph = problem.costed.graph
    forward = [
        v
        for v, value in enumerate(graph.values)
        if value.node < graph.num_forward and graph.nodes[value.node].can_rematerialize and not value.is_held
    ]
    time_s, smallest = float("inf"), 2**62
    for count in range(len(forward) + 1):
        for retained in itertools.combinations(forward, count):
            trace = simulate(problem, just_in_time(graph, retained))
            smallest = min(smallest, trace.peak_bytes)
            if trace.peak_bytes <= problem.budget_bytes:
                time_s = min(time_s, trace.time_s)
    return Best(time_s, smallest)


def best_time_s(problem: Problem, *, free_order: bool = False, in_stages: bool = False) -> float:
    """Seconds of the cheapest schedule of all, by a shortest path over what has run and what is there.

    Args:
        problem: of about nine nodes, or twelve with few that may run twice.
        free_order: first runs in any topological order within their phase; otherwise in the graph's.
        in_stages: between two first runs nodes run again in the graph's order, each at most once.

    Returns:
        Seconds; inf if no schedule fits the budget.
    """
    graph, seconds = problem.costed.graph, problem.costed.time_s
    if problem.static.optimizer_step_peak_bytes > problem.budget_bytes:
        return float("inf")
    room = problem.budget_bytes - problem.static.resident_bytes
    count = len(graph.nodes)
    size = [value.size_bytes for value in graph.values]
    everything = (1 << count) - 1
    inputs = [sum(1 << v for v in set(node.inputs)) for node in graph.nodes]
    made = [sum(1 << v for v in node.outputs) for node in graph.nodes]
    again = [sum(1 << v for v in node.outputs if not graph.values[v].first_run_only) for node in graph.nodes]
    held = sum(1 << v for v, value in enumerate(graph.values) if value.is_held)

    def bytes_of(there: int) -> int:
        return sum(size[v] for v in range(len(size)) if there >> v & 1)

    def may_run_first(k: int, ran: int) -> bool:
        if not free_order:
            return ran == (1 << k) - 1
        earlier_phase = [
            j
            for j in range(count)
            if j < k
            and (
                graph.nodes[j].phase is not graph.nodes[k].phase
                or (graph.nodes[j].keeps_place and graph.nodes[k].keeps_place)
            )
        ]
        return all(ran >> j & 1 for j in earlier_phase)

    # What has run, what is there, and the first node that may still run again in this stage.
    queue: list[tuple[float, int, int, int]] = [(0.0, 0, 0, 0)]
    reached = {(0, 0, 0): 0.0}
    while queue:
        time_s, ran, there, least = heapq.heappop(queue)
        if reached[ran, there, least] < time_s:
            continue
        if ran == everything:
            return time_s
        steps: list[tuple[float, int, int, int]] = [
            (0.0, ran, there & ~(1 << v), least) for v in range(len(size)) if (there & ~held) >> v & 1
        ]
        for k, node in enumerate(graph.nodes):
            is_first = not ran >> k & 1
            if inputs[k] & ~there or (is_first and not may_run_first(k, ran)):
                continue
            if not is_first and (not node.can_rematerialize or (in_stages and k < least)):
                continue
            outputs = made[k] if is_first else again[k]
            if bytes_of(there) + bytes_of(outputs) + node.workspace_bytes > room:
                continue
            now_least = 0 if is_first or not in_stages else k + 1
            steps.append((seconds[k], ran | 1 << k, there | outputs, now_least))
        for added_s, *state in steps:
            total_s = time_s + added_s
            if total_s < reached.get((state[0], state[1], state[2]), float("inf")):
                reached[state[0], state[1], state[2]] = total_s
                heapq.heappush(queue, (total_s, state[0], state[1], state[2]))
    return float("inf")
