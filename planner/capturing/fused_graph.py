"""Kernels -> the graph that has them as nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.work import Work
from planner.capturing.loops import Loop, Reduced
from planner.graph import Graph, Node, Value


@dataclass
class Kernel:
    """One kernel while it grows.

    Attributes:
        roots: operations whose results it may write.
        inlined: operations that it computes on the way.
        reads: values that it reads, makers inside included.
        loop: of all; `num_read` is its longest.
        is_free: it may be fused with others.
        merged: its operations are in another one now.
    """

    roots: list[int]
    inlined: set[int]
    reads: set[int]
    loop: Loop
    is_free: bool
    merged: bool = False


@dataclass(frozen=True)
class Fused:
    """Kernels in place of operations.

    Attributes:
        graph: one node a kernel, one value for what is in memory between kernels.
        members: for each kernel the nodes that it computes, in order; one may be in several.
        values: for each value its index in the graph of operations.
    """

    graph: Graph
    members: tuple[tuple[int, ...], ...]
    values: tuple[int, ...]


def fused_graph(graph: Graph, kernels: Sequence[Kernel]) -> Fused:
    """Number the kernels and the values between them.

    Args:
        graph: operations.
        kernels: in an order in which every value is made before it is read; merged ones are left out.
    """
    readers: dict[int, set[int]] = {}
    for at, kernel in enumerate(kernels):
        for v in () if kernel.merged else kernel.reads:
            readers.setdefault(v, set()).add(at)
    nodes: list[Node] = []
    values: list[Value] = []
    members: list[tuple[int, ...]] = []
    olds: list[int] = []
    new_of: dict[int, int] = {}
    for at, kernel in enumerate(kernels):
        if kernel.merged:
            continue
        made = [v for root in sorted(kernel.roots) for v in graph.nodes[root].outputs]
        outputs = [
            v for v in made if not kernel.is_free or graph.values[v].is_held or readers.get(v, set()) - {at}
        ]
        inputs = [new_of[v] for v in sorted(kernel.reads - set(made))]
        for v in outputs:
            new_of[v] = len(values)
            values.append(dataclasses.replace(graph.values[v], node=len(nodes)))
            olds.append(v)
        inside = tuple(sorted({*kernel.roots, *kernel.inlined}))
        nodes.append(_node(graph, kernel, inside, inputs, [new_of[v] for v in outputs], values))
        members.append(inside)
    return Fused(Graph(tuple(nodes), tuple(values)), tuple(members), tuple(olds))


def _node(
    graph: Graph,
    kernel: Kernel,
    inside: tuple[int, ...],
    inputs: list[int],
    outputs: list[int],
    values: list[Value],
) -> Node:
    """One kernel as a node: a roofline over what it reads and writes, and all its arithmetic."""
    last = graph.nodes[max(kernel.roots)]
    if len(inside) == 1:
        return dataclasses.replace(last, inputs=tuple(inputs), outputs=tuple(outputs))
    ops = [graph.nodes[m] for m in inside]
    read_bytes = sum(values[v].size_bytes for v in inputs) + sum(_not_values_bytes(graph, op) for op in ops)
    roots = [graph.nodes[m] for m in kernel.roots]
    return Node(
        name=last.name,
        op="fused " + " ".join(op.op.split(".")[1] if "." in op.op else op.op for op in ops),
        phase=last.phase,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        work=Work(
            flop=sum(op.work.flop for op in ops),
            read_bytes=read_bytes,
            written_bytes=sum(values[v].size_bytes for v in outputs),
            dtype=last.work.dtype,
            kind="elementwise" if kernel.loop.reduced is Reduced.NONE else "reduction",
        ),
        can_rematerialize=all(op.can_rematerialize for op in roots),
        layer=next((op.layer for op in reversed(roots) if op.layer), ""),
        keeps_place=any(op.keeps_place for op in roots),
    )


def _not_values_bytes(graph: Graph, node: Node) -> int:
    """Bytes that an operation reads of parameters and inputs of the step."""
    return max(0, node.work.read_bytes - sum(graph.values[v].size_bytes for v in node.inputs))
