"""What every schedule in the graph's order needs: bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.problem import Problem
from planner.solvers.sequences import fixed_values


def least_need_bytes(problem: Problem, *, free_order: bool = False) -> int:
    """Bytes that any schedule of the step needs.

        max_k (static + inputs of k + outputs of k + workspace of k + values held before k)

    Args:
        problem: its budget is not read.
        free_order: first runs in any order; what is held before a node then says nothing.

    Returns:
        Bytes of the rank; a smaller budget is infeasible.
    """
    graph = problem.costed.graph
    most, held = 0, 0
    for node in graph.nodes:
        now = held + node.workspace_bytes
        for v in {*node.inputs, *node.outputs}:
            value = graph.values[v]
            if free_order or not value.is_held or v in node.outputs:
                now += value.size_bytes
        most = max(most, now)
        if not free_order:
            held += sum(graph.values[v].size_bytes for v in node.outputs if graph.values[v].is_held)
    return max(most + problem.static.resident_bytes, problem.static.optimizer_step_peak_bytes)


@dataclass(frozen=True)
class Cover:
    """The least that must run again, counted once.

    Attributes:
        bound_s: seconds that any schedule takes in which nodes first run in the graph's order.
        nodes: forward nodes whose second run frees what is too much; the last of them may be needed in part.
    """

    bound_s: float
    nodes: tuple[int, ...]


def cheapest_cover(problem: Problem) -> Cover:
    """Nodes that weigh at least what does not fit when backward begins, or at a later time.

    When backward node t runs for the first time, each forward value that t or a later node reads is there, or its
    node runs again afterwards. Those that are there fit into the budget beside what backward has made, so nodes
    whose outputs weigh at least the excess run again:

        bound = step + max_t min { sum_k c_k d_k : sum_k m_k d_k >= needed_t - budget, 0 <= d_k <= 1 }

    Where all costs and all sizes are equal, d is taken as whole. Fixed values count as there, and so does what t
    itself reads and makes.

    Args:
        problem: graph, seconds, budget, static memory.

    Returns:
        The bound, which is the step's own time without a forward phase, and the nodes of the binding time.
    """
    costed = problem.costed
    graph, cut = costed.graph, costed.graph.num_forward
    fixed = fixed_values(graph)
    room = problem.budget_bytes - problem.static.resident_bytes
    # A value that backward makes and may make again proves nothing, except while a node reads or makes it.
    certain = np.zeros(len(graph.nodes) + 1)
    optional: list[tuple[int, int]] = []
    for v, value in enumerate(graph.values):
        users = graph.users[v]
        last = len(graph.nodes) - 1 if value.is_held else max([value.node, *users])
        if v in fixed:
            certain[value.node] += value.size_bytes
            certain[last + 1] -= value.size_bytes
        elif value.node < cut <= last and value.size_bytes:
            optional.append((v, last))
    sure = np.cumsum(certain[:-1])
    extra_s, chosen = 0.0, ()
    for t in _turning_points(cut, len(graph.nodes), [last for _, last in optional]):
        size: dict[int, int] = {}
        reads = set(graph.nodes[t].inputs)
        there = sum(graph.values[v].size_bytes for v in {*reads, *graph.nodes[t].outputs} if v not in fixed)
        for v, last in optional:
            if last >= t and v not in reads:
                value = graph.values[v]
                size[value.node] = size.get(value.node, 0) + value.size_bytes
        excess = sum(size.values()) + sure[t] + there + graph.nodes[t].workspace_bytes - room
        if excess > 0:
            cost_s, nodes = _cheapest([(costed.time_s[k], m, k) for k, m in size.items()], excess)
            if cost_s > extra_s or not chosen:
                extra_s, chosen = max(cost_s, extra_s), nodes
    return Cover(costed.step_s + extra_s, chosen)


def _turning_points(first: int, stop: int, ends: list[int]) -> list[int]:
    """At most 32 backward times, the first among them: enough, as what is needed only shrinks with time."""
    times = sorted({first, *(t + 1 for t in ends if t + 1 < stop), *ends}) if first < stop else []
    step = max(1, len(times) // 32)
    return [t for t in times if t >= first][::step]


def _cheapest(items: list[tuple[float, int, int]], excess: float) -> tuple[float, tuple[int, ...]]:
    """Least cost of items (seconds, bytes, node) that weigh the excess or more; fractional unless all are equal."""
    whole = len({item[:2] for item in items}) == 1
    cost, nodes = 0.0, list[int]()
    for time_s, size_bytes, node in sorted(items, key=lambda item: item[0] / item[1]):
        if excess <= 0:
            break
        cost += time_s * (1.0 if whole else min(1.0, excess / size_bytes))
        excess -= size_bytes
        nodes.append(node)
    return cost, tuple(nodes)
