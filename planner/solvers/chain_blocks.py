"""A training step as a chain of blocks: one value between two of them, backward mirrored."""

from __future__ import annotations

from planner.costed import CostedGraph
from planner.graph import Graph
from planner.solvers.chain_measure import Block, measure
from planner.solvers.sequences import fixed_values


def chain_of_blocks(costed: CostedGraph) -> list[Block]:
    """Cut the forward graph wherever one value crosses and backward goes through the blocks in reverse.

    A value that may not be dropped is no cut. Where backward reads values of several blocks in another order (skip
    connections), the blocks between become one.

    Args:
        costed: a training step with a forward phase and something after it.

    Returns:
        At least one block, measured.
    """
    graph = costed.graph
    fixed = fixed_values(graph)
    cuts = _single_value_cuts(graph, fixed)
    while True:
        blocks = [Block([])]
        for k in range(graph.num_forward):
            blocks[-1].forward.append(k)
            if k in cuts:
                blocks[-1].output = cuts[k]
                blocks.append(Block([]))
        merged = _assign_backward(graph, blocks, fixed)
        if not merged:
            break
        for k in merged:
            del cuts[k]
    measure(costed, blocks, fixed)
    return blocks


def _single_value_cuts(graph: Graph, fixed: frozenset[int]) -> dict[int, int]:
    """Last node of a block -> the one value that later forward nodes read."""
    cut = graph.num_forward
    last_read = [max((t for t in users if t < cut), default=-1) for users in graph.users]
    crossing: set[int] = set()
    cuts: dict[int, int] = {}
    place: dict[int, int] = {}
    for k in range(cut - 1):
        node = graph.nodes[k]
        crossing.difference_update([v for v in node.inputs if last_read[v] == k])
        crossing.update(v for v in node.outputs if last_read[v] > k)
        if len(crossing) == 1:
            (value,) = crossing
            if value in fixed or graph.values[value].size_bytes == 0:
                continue
            # The same value may cross after several nodes in a row: the last of them ends the block.
            cuts.pop(place.get(value, -1), None)
            cuts[k] = place[value] = value
            place[value] = k
    return cuts


def _assign_backward(graph: Graph, blocks: list[Block], fixed: frozenset[int]) -> list[int]:
    """Give every later node to a block, from the last block down; the cuts that stand in the way, if any."""
    home: dict[int, tuple[int, int]] = {}
    for i, block in enumerate(blocks):
        for k in block.forward:
            for v in graph.nodes[k].outputs:
                if v not in fixed:
                    home[v] = (i, i + 1 if v == block.output else i)
    current = len(blocks) - 1
    waiting: list[int] = []
    for j in range(graph.num_forward, len(graph.nodes)):
        reads = [home[v] for v in graph.nodes[j].inputs if v in home]
        waiting.append(j)
        if not reads:
            continue
        lowest, highest = max(low for low, _ in reads), min(current, *(high for _, high in reads))
        if highest < lowest:
            return [blocks[i].forward[-1] for i in range(highest, lowest)]
        current = highest
        # A node that reads no forward value waits for the next one that does: the block above has no need of it.
        blocks[current].backward += waiting
        waiting = []
    blocks[0].backward += waiting
    for above, block in zip(blocks[:0:-1], blocks[-2::-1], strict=True):
        if not block.backward:
            _hand_down(graph, above, block, {v for v, (low, _) in home.items() if blocks[low] is above})
    return []


def _hand_down(graph: Graph, above: Block, block: Block, own: set[int]) -> None:
    """Nodes after the last one that reads values of the block above are those of an empty block."""
    places = [p for p, j in enumerate(above.backward) if own & set(graph.nodes[j].inputs)]
    if places:
        block.backward = above.backward[places[-1] + 1 :]
        del above.backward[places[-1] + 1 :]
