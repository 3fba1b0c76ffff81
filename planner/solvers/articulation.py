"""Nodes of the forward graph where a segment may end."""

from __future__ import annotations

from planner.graph import Graph


def articulation_points(graph: Graph) -> list[int]:
    """Forward nodes whose removal parts the forward graph, edges taken without direction.

    Depth-first search with low points, iterative: a node other than the root is one when some child in the tree
    reaches nothing above it; the root is one when it has two children.

    Args:
        graph: a training step; an edge joins the maker of a value and each of its forward readers.

    Returns:
        Nodes in order. On a chain every node but the first and the last.

    Reference: Hopcroft and Tarjan, 1973, Algorithm 447, Communications of the ACM 16(6).
    """
    cut = graph.num_forward
    neighbours: list[list[int]] = [[] for _ in range(cut)]
    for k in range(cut):
        for maker in {graph.values[v].node for v in graph.nodes[k].inputs}:
            neighbours[k].append(maker)
            neighbours[maker].append(k)
    found: set[int] = set()
    depth = [-1] * cut
    low = [0] * cut
    for root in range(cut):
        if depth[root] >= 0:
            continue
        depth[root], children = 0, 0
        stack = [(root, -1, iter(neighbours[root]))]
        while stack:
            node, parent, rest = stack[-1]
            for other in rest:
                if depth[other] < 0:
                    depth[other] = low[other] = depth[node] + 1
                    stack.append((other, node, iter(neighbours[other])))
                    break
                if other != parent:
                    low[node] = min(low[node], depth[other])
            else:
                stack.pop()
                if parent == root:
                    children += 1
                elif parent >= 0 and low[node] >= depth[parent]:
                    found.add(parent)
                if parent >= 0:
                    low[parent] = min(low[parent], low[node])
        if children > 1:
            found.add(root)
    return sorted(found)


def candidates(graph: Graph, *, linearized: bool) -> list[int]:
    """Nodes after which a segment may end: every forward node, or the articulation points alone.

    Args:
        graph: the training step.
        linearized: take the forward graph for a chain in its own order.

    Returns:
        Forward nodes in order.
    """
    return list(range(graph.num_forward)) if linearized else articulation_points(graph)


def has_backward(graph: Graph) -> bool:
    """Whether there is a forward phase and something after it."""
    return 0 < graph.num_forward < len(graph.nodes)
