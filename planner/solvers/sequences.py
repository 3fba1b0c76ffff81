"""Orders in which nodes run, out of retained values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from planner.graph import Graph


def fixed_values(graph: Graph) -> frozenset[int]:
    """Values that no schedule can drop and make again: held ones, and those that no second run makes."""
    return frozenset(
        v
        for v, value in enumerate(graph.values)
        if value.is_held or value.first_run_only or not graph.nodes[value.node].can_rematerialize
    )


def nodes_to_run(graph: Graph, wanted: Iterable[int], there: Collection[int]) -> list[int]:
    """The fewest nodes that make the wanted values out of what is there.

    Args:
        graph: the training step.
        wanted: values.
        there: values that need not be made.

    Returns:
        Nodes in the graph's order.
    """
    chosen: set[int] = set()
    stack = [v for v in wanted if v not in there]
    while stack:
        node = graph.values[stack.pop()].node
        if node not in chosen:
            chosen.add(node)
            stack.extend(v for v in graph.nodes[node].inputs if v not in there)
    return sorted(chosen)


def order_of_stages(graph: Graph, retained: Sequence[Collection[int]]) -> list[int]:
    """The order with the fewest runs under given retained values: the second phase of Checkmate's rounding.

    In stage t node t runs for the first time. Before it those nodes run again whose outputs are read, or retained
    into the next stage, without being retained into this one.

    Args:
        graph: the training step.
        retained: for each stage the values that are retained into it; fixed values are, whether listed or not.

    Returns:
        Nodes in order of execution.
    """
    fixed = fixed_values(graph)
    order: list[int] = []
    before: set[int] = set()
    for t, node in enumerate(graph.nodes):
        made_now = set(node.outputs)
        after: set[int] = set()
        if t + 1 < len(graph.nodes):
            after = {v for v in retained[t + 1] if graph.values[v].node <= t}
        after |= {v for v in before | made_now if v in fixed}
        wanted = [*node.inputs, *(v for v in after if v not in made_now)]
        order.extend(nodes_to_run(graph, wanted, before))
        order.append(t)
        before = after
    return order
