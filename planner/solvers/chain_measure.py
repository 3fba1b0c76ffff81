"""Blocks of a chain, and the bytes and seconds of running them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.costed import CostedGraph
from planner.graph import Graph
from planner.solvers.sequences import nodes_to_run


@dataclass
class Run:
    """Some nodes of one block, run in order.

    Attributes:
        nodes: in order.
        time_s: of all of them.
        own_input_bytes: most bytes while the input of the block stays, its own bytes not counted.
        passing_bytes: the same while the input goes after its last use, its own bytes counted.
    """

    nodes: list[int]
    time_s: float
    own_input_bytes: int
    passing_bytes: int


@dataclass
class Block:
    """Forward nodes between two cuts, and the backward nodes that read their values.

    Attributes:
        forward: nodes.
        backward: nodes; those of the last block begin with the loss.
        output: the value that later blocks read; None for the last block.
        output_bytes: its size; 0 for the last block.
        reads_input: backward of this block reads the output of the block before.
        inner: values of the block that its backward reads, the output aside.
        kept_bytes: of the inner values and the output.
        before_first_bytes: fixed values of earlier blocks, when the block first runs.
        beside_bytes: fixed values, gradients and other values that are there when its backward begins.
        backward_bytes: most bytes of backward, with all it reads; the block's input is not counted.
        backward_s: seconds of backward.
        first_out, first_all: the first run, ending with the output alone, or with the inner values too.
        again_out, again_all: a second run, likewise.
        again_backward: a second run for backward alone, from the input.
        again_inner: a second run for backward alone, from input and output.
    """

    forward: list[int]
    output: int | None = None
    backward: list[int] = field(default_factory=list)
    output_bytes: int = 0
    reads_input: bool = False
    inner: set[int] = field(default_factory=set)
    kept_bytes: int = 0
    before_first_bytes: int = 0
    beside_bytes: int = 0
    backward_bytes: int = 0
    backward_s: float = 0.0
    first_out: Run = field(init=False)
    first_all: Run = field(init=False)
    again_out: Run = field(init=False)
    again_all: Run = field(init=False)
    again_backward: Run = field(init=False)
    again_inner: Run = field(init=False)


def measure(costed: CostedGraph, blocks: list[Block], fixed: frozenset[int]) -> None:
    """Fill in what the dynamic program reads.

    Args:
        costed: the training step.
        blocks: of its chain, with nodes and outputs.
        fixed: values that no schedule can drop.
    """
    graph = costed.graph
    beside, before = _beside_bytes(graph, blocks, fixed)
    before_value: int | None = None
    for i, block in enumerate(blocks):
        reads = {v for j in block.backward for v in graph.nodes[j].inputs} - fixed
        first, last = block.forward[0], block.forward[-1]
        own = {v for v in reads if first <= graph.values[v].node <= last}
        out = {block.output} if block.output is not None else set[int]()
        block.inner = own - out
        block.reads_input = before_value in reads
        block.output_bytes = sum(graph.values[v].size_bytes for v in out)
        block.kept_bytes = sum(graph.values[v].size_bytes for v in block.inner | out)
        block.beside_bytes, block.before_first_bytes = beside[i], before[i]
        block.backward_s = sum(costed.time_s[j] for j in block.backward)
        block.backward_bytes = beside[i] + _backward_peak(graph, block, own)
        there = fixed | ({before_value} if before_value is not None else set())
        entering = before_value

        def run(
            nodes: list[int], keep: set[int], *, again: bool = True, entering: int | None = entering
        ) -> Run:
            own_input, passing = _peaks(graph, nodes, keep, entering, fixed, again=again)
            return Run(nodes, sum(costed.time_s[k] for k in nodes), own_input, passing)

        block.first_out = run(block.forward, out, again=False)
        if first == last and not block.inner:
            # A plain link of a chain: all its runs are alike, and none is needed where its output is there.
            block.first_all, block.again_inner = block.first_out, Run([], 0.0, 0, 0)
            again = run(block.forward, out)
            block.again_out = block.again_all = again
            block.again_backward = again if own else block.again_inner
        else:
            block.first_all = run(block.forward, out | block.inner, again=False)
            block.again_out = run(nodes_to_run(graph, out, there), out)
            block.again_all = run(nodes_to_run(graph, out | block.inner, there), out | block.inner)
            block.again_backward = run(nodes_to_run(graph, own, there), own)
            block.again_inner = run(nodes_to_run(graph, block.inner, there | out), block.inner)
        before_value = block.output


def _beside_bytes(graph: Graph, blocks: list[Block], fixed: frozenset[int]) -> tuple[list[int], list[int]]:
    """For each block: bytes beside the chain's values when its backward begins, and when it first runs."""
    cut, count = graph.num_forward, len(graph.nodes)
    size = [value.size_bytes for value in graph.values]
    last = [
        count if value.is_held else max([value.node, *users])
        for value, users in zip(graph.values, graph.users, strict=True)
    ]
    beside: list[int] = []
    before: list[int] = []
    watched = [v for v, value in enumerate(graph.values) if value.node >= cut or v in fixed]
    start, end = cut, cut
    for block in reversed(blocks):
        start = block.backward[0] if block.backward else end
        end = block.backward[-1] + 1 if block.backward else end
        beside.insert(0, sum(size[v] for v in watched if graph.values[v].node < start <= last[v]))
    for block in blocks:
        start = block.forward[0]
        before.append(sum(size[v] for v in watched if graph.values[v].node < start <= last[v]))
    return beside, before


def _backward_peak(graph: Graph, block: Block, own: set[int]) -> int:
    """Most bytes while backward of a block runs, beyond what was beside it; the block's input is not counted."""
    live = peak = sum(graph.values[v].size_bytes for v in own)
    first = block.backward[0] if block.backward else 0
    for j in block.backward:
        node = graph.nodes[j]
        live += sum(graph.values[v].size_bytes for v in node.outputs)
        peak = max(peak, live + node.workspace_bytes)
        for v in {*node.inputs, *node.outputs}:
            value = graph.values[v]
            mine = (
                v in own or value.node >= graph.num_forward or (value.node < first and not _drops(graph, v))
            )
            if mine and not value.is_held and max(graph.users[v], default=j) <= j:
                live -= value.size_bytes
    return peak


def _drops(graph: Graph, v: int) -> bool:
    """Whether a forward value can be dropped and made again."""
    value = graph.values[v]
    return not value.first_run_only and graph.nodes[value.node].can_rematerialize


def _peaks(
    graph: Graph,
    nodes: Sequence[int],
    keep: set[int],
    entering: int | None,
    fixed: frozenset[int],
    *,
    again: bool,
) -> tuple[int, int]:
    """Most bytes of a run: with the block's input staying (not counted), and going after its last use (counted)."""
    last: dict[int, int] = {}
    for k in nodes:
        node = graph.nodes[k]
        for v in (*node.outputs, *node.inputs):
            last[v] = k
    input_bytes = graph.values[entering].size_bytes if entering is not None else 0
    live = staying = passing = 0
    here = input_bytes if entering in last else 0
    for k in nodes:
        node = graph.nodes[k]
        outputs = [v for v in node.outputs if not (again and graph.values[v].first_run_only)]
        now = live + node.workspace_bytes + sum(graph.values[v].size_bytes for v in outputs)
        staying, passing = max(staying, now), max(passing, now + here)
        live += sum(graph.values[v].size_bytes for v in outputs if not (again and v in fixed))
        for v in {*node.inputs, *outputs}:
            value = graph.values[v]
            if last[v] != k:
                continue
            if v == entering:
                here = 0
            elif (
                value.node < nodes[0]
                or v in keep
                or (v in fixed and (again or _outlives(graph, v, nodes[-1])))
            ):
                continue
            elif value.node in nodes:
                live -= value.size_bytes
    return staying, passing


def _outlives(graph: Graph, v: int, node: int) -> bool:
    """Whether a value is needed after a node."""
    return graph.values[v].is_held or max(graph.users[v], default=-1) > node
