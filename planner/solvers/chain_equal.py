"""Chains on which persistent schedules are proven to be the best of all; FORMULATIONS.md has the proof."""

from __future__ import annotations

from planner.graph import Graph
from planner.solvers.chain_measure import Block


def persistent_is_optimal(graph: Graph, blocks: list[Block]) -> bool:
    """Whether no schedule beats a persistent one, whatever the costs.

    Every block is one node with one value, all of the same size a; backward of a block reads its input and its
    output, and needs at least a bytes more than running forward nodes before it; no second run of a backward node
    saves anything.

    Args:
        graph: the training step.
        blocks: its chain, measured.
    """
    values, cut = graph.values, graph.num_forward
    sizes = {value.size_bytes for value in values[: len(blocks)]}
    plain = len(blocks) == cut and all(graph.nodes[k].outputs == (k,) for k in range(cut)) and len(sizes) == 1
    if not plain or not all(graph.nodes[k].can_rematerialize for k in range(cut)):
        return False
    (size,) = sizes
    workspace = max(graph.nodes[k].workspace_bytes for k in range(cut))
    for i, block in enumerate(blocks):
        both = {i, i - 1} if i else {i}
        mirrored = block.backward and both <= set(graph.nodes[block.backward[-1]].inputs)
        if not mirrored or len(block.backward) > 1 + (i == cut - 1) or values[i].is_held:
            return False
        # In the last block a loss comes first: it makes what its reader finds, so that memory is highest after it.
        if not all(
            values[v].is_held or graph.users[v] for j in block.backward[:-1] for v in graph.nodes[j].outputs
        ):
            return False
        made = [sum(values[v].size_bytes for v in graph.nodes[j].outputs) for j in block.backward]
        spare = [graph.nodes[j].workspace_bytes for j in block.backward]
        if made[-1] + spare[-1] < size + workspace or max(spare[:-1], default=0) > made[-1]:
            return False
    return _backward_stays(graph)


def _backward_stays(graph: Graph) -> bool:
    """Backward nodes run once, or a second run would need as many bytes as it frees."""
    later = range(graph.num_forward, len(graph.nodes))
    made = [v for j in later for v in graph.nodes[j].outputs]
    once = not any(graph.nodes[j].can_rematerialize for j in later)
    next_only = all(set(graph.users[v]) <= {graph.values[v].node + 1} for v in made)
    equal = len({graph.values[v].size_bytes for v in made}) == 1 and len(made) == len(later)
    return next_only and (once or equal)
