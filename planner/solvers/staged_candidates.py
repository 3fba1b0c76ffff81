"""Which nodes may run again in which stage: those near the readers, where memory could pass the room."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np

from planner.problem import Problem
from planner.solvers.reruns import Rerun


def nearby(problem: Problem, depth: int) -> list[list[int]]:
    """For each stage the nodes that may run again in it: those that make its inputs, and theirs, `depth` deep.

    Args:
        problem: the graph.
        depth: longest chain of reruns in a stage; no less than the number of nodes is every earlier node.

    Returns:
        For each node t the earlier nodes, in order.
    """
    graph = problem.costed.graph
    if depth >= len(graph.nodes):
        again = [k for k, node in enumerate(graph.nodes) if node.can_rematerialize]
        return [again[: bisect_left(again, t)] for t in range(len(graph.nodes))]
    makers = [
        tuple(
            dict.fromkeys(
                value.node
                for value in (graph.values[v] for v in node.inputs)
                if graph.nodes[value.node].can_rematerialize
                and value.size_bytes > 0
                and not value.is_held
                and not value.first_run_only
            )
        )
        for node in graph.nodes
    ]
    stages: list[list[int]] = []
    for t in range(len(graph.nodes)):
        seen: set[int] = set()
        front = [t]
        for _ in range(min(depth, t)):
            if not front:
                break
            front = [k for user in front for k in makers[user] if k not in seen]
            seen.update(front)
            front = list(dict.fromkeys(front))
        stages.append(sorted(seen))
    return stages


def binding_stages(problem: Problem, candidates: Iterable[Rerun]) -> np.ndarray:
    """For each stage whether memory could pass the room in it, whatever of the candidates runs again."""
    graph = problem.costed.graph
    last = [max((value.node, *users)) for value, users in zip(graph.values, graph.users, strict=True)]
    workspace = [node.workspace_bytes for node in graph.nodes]
    for t, k in candidates:
        workspace[t] = max(workspace[t], graph.nodes[k].workspace_bytes)
        for v in (*graph.nodes[k].inputs, *graph.nodes[k].outputs):
            last[v] = max(last[v], t)
    delta = np.zeros(len(graph.nodes) + 1)
    for v, value in enumerate(graph.values):
        delta[value.node] += value.size_bytes
        delta[(len(graph.nodes) - 1 if value.is_held else last[v]) + 1] -= value.size_bytes
    room = problem.budget_bytes - problem.static.resident_bytes
    return np.cumsum(delta[:-1]) + np.array(workspace) > room
