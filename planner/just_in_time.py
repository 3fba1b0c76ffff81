"""A set of retained values -> the schedule that rematerializes all others just in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.graph import Graph
from planner.schedule import Compute, Free, Instruction, Schedule


def just_in_time(graph: Graph, retained: Iterable[int]) -> Schedule:
    """Retain a set of forward values; rematerialize the others right before their first use in backward.

    A rematerialized value stays until its last use; so does a retained one. Everything is freed at its last
    use. A value that cannot be rematerialized is retained whether it is in the set or not.

    Args:
        graph: the training step.
        retained: indices of forward values to keep for backward.

    Returns:
        A schedule that does the whole step.
    """
    kept = set(retained)
    for index, value in enumerate(graph.values):
        if value.is_held or value.first_run_only or not graph.nodes[value.node].can_rematerialize:
            kept.add(index)
    order: list[int] = list(range(graph.num_forward))
    there = set(kept)
    for index in range(graph.num_forward, len(graph.nodes)):
        order.extend(_missing(graph, index, there))
        order.append(index)
        there.update(graph.nodes[index].outputs)
    return schedule_of_order(graph, order)


def _missing(graph: Graph, target: int, there: set[int]) -> list[int]:
    """Forward nodes to run again so that the target's inputs are there, in forward order."""
    again: set[int] = set()
    stack = [v for v in graph.nodes[target].inputs if v not in there]
    while stack:
        node = graph.values[stack.pop()].node
        if node not in again:
            again.add(node)
            stack.extend(v for v in graph.nodes[node].inputs if v not in there)
    for node in again:
        there.update(v for v in graph.nodes[node].outputs)
    return sorted(again)


def schedule_of_order(graph: Graph, order: Sequence[int]) -> Schedule:
    """Free each value after its last use before it is made again.

    No other choice of frees has fewer live bytes at any time: a node that runs again allocates all its outputs,
    whether older copies are there or not.

    Args:
        graph: the training step.
        order: nodes to run; a node may be there several times.

    Returns:
        The schedule.
    """
    last_use: dict[int, int] = {}
    frees_after: list[list[int]] = [[] for _ in order]
    runs = [0] * len(graph.nodes)
    for position, index in enumerate(order):
        node = graph.nodes[index]
        for v in node.inputs:
            last_use[v] = position
        for v in node.outputs:
            if graph.values[v].is_held or (runs[index] and graph.values[v].first_run_only):
                continue
            if runs[index]:
                frees_after[last_use[v]].append(v)
            last_use[v] = position
        runs[index] += 1
    for v, position in last_use.items():
        if not graph.values[v].is_held:
            frees_after[position].append(v)
    instructions: list[Instruction] = []
    for index, frees in zip(order, frees_after, strict=True):
        instructions.append(Compute(index))
        instructions.extend(Free(v) for v in sorted(frees))
    return Schedule(tuple(instructions))
