"""Tiny training graphs for tests, by hand and at random."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from cost_models.work import Work
from planner.costed import CostedGraph
from planner.graph import Graph, Node, Phase, Value, ValueKind
from planner.problem import Problem, StaticMemory

NO_WORK = Work(flop=0.0, read_bytes=0, written_bytes=0, dtype="float32", kind="elementwise")


def node(
    name: str,
    phase: Phase,
    inputs: Sequence[int] = (),
    outputs: Sequence[int] = (),
    *,
    can_rematerialize: bool | None = None,
) -> Node:
    """A node without work; forward ones may run twice unless said otherwise."""
    again = phase is Phase.FORWARD if can_rematerialize is None else can_rematerialize
    keeps_place = phase is Phase.FORWARD and not again
    return Node(
        name, f"test.{name}", phase, tuple(inputs), tuple(outputs), NO_WORK, again, keeps_place=keeps_place
    )


def chain(sizes: Sequence[int], *, grad_bytes: int = 1) -> Graph:
    """A chain of forward nodes, and backward ones in reverse, each reading its node's input and output.

    Forward node i makes value i of `sizes[i]` bytes from value i-1. Backward node i reads values i and i-1 and the
    gradient of the node after it, and makes a gradient of `grad_bytes` bytes; the last one is returned.
    """
    n = len(sizes)
    nodes = [node(f"f{i}", Phase.FORWARD, [i - 1] if i else [], [i]) for i in range(n)]
    values = [Value(f"v{i}", size, i) for i, size in enumerate(sizes)]
    for step, i in enumerate(reversed(range(n))):
        reads = [i] + ([i - 1] if i else []) + ([n + step - 1] if step else [])
        nodes.append(node(f"b{i}", Phase.BACKWARD, reads, [n + step]))
        kind = ValueKind.GRADIENT if i == 0 else ValueKind.ACTIVATION
        values.append(Value(f"g{i}", grad_bytes, n + step, kind))
    return Graph(tuple(nodes), tuple(values))


def training_chain(sizes: Sequence[int] = (5, 1, 4, 1, 3), *, cost: float = 1.0) -> str:
    """The file of a bare graph that is a `chain`."""
    graph = chain(sizes)
    nodes = [
        {
            "cost": cost,
            "bytes": sum(graph.values[v].size_bytes for v in node.outputs),
            "backward": node.phase is Phase.BACKWARD,
        }
        for node in graph.nodes
    ]
    edges = [[graph.values[v].node, k] for k, node in enumerate(graph.nodes) for v in node.inputs]
    return json.dumps({"nodes": nodes, "edges": edges})


def random_training_graph(seed: int, *, num_forward: int, max_bytes: int = 9) -> Graph:
    """A random forward DAG with a mirrored backward, some nodes of two outputs, some that may not run twice."""
    rng = random.Random(seed)
    nodes: list[Node] = []
    values: list[Value] = []
    made: list[tuple[int, ...]] = []
    for i in range(num_forward):
        available = [v for outs in made for v in outs]
        count = min(len(available), rng.randint(1, 2))
        recent = available[-3:]
        inputs = sorted({rng.choice(recent if rng.random() < 0.7 else available) for _ in range(count)})
        outs = []
        for _ in range(2 if rng.random() < 0.25 else 1):
            outs.append(len(values))
            values.append(Value(f"v{len(values)}", rng.randint(0, max_bytes), i))
        made.append(tuple(outs))
        nodes.append(node(f"f{i}", Phase.FORWARD, inputs, outs, can_rematerialize=rng.random() < 0.85))
    gradient: int | None = None
    for i in reversed(range(num_forward)):
        reads = {v for v in (*nodes[i].inputs, *made[i]) if rng.random() < 0.7}
        if gradient is not None:
            reads.add(gradient)
        gradient = len(values)
        values.append(Value(f"g{i}", rng.randint(0, 3), len(nodes)))
        nodes.append(node(f"b{i}", Phase.BACKWARD, sorted(reads), [gradient]))
    values[-1] = Value("g_last", values[-1].size_bytes, values[-1].node, ValueKind.GRADIENT)
    return Graph(tuple(nodes), tuple(values))


def priced(graph: Graph, *, seed: int | None = None) -> CostedGraph:
    """One second for every node, or random whole seconds."""
    rng = random.Random(seed)
    times = tuple(1.0 if seed is None else float(rng.randint(0, 5)) for _ in graph.nodes)
    return CostedGraph(graph, times)


def problem(costed: CostedGraph, budget_bytes: int, *, parameter_bytes: int = 0) -> Problem:
    """A problem with nothing static but parameters."""
    return Problem(costed, budget_bytes, StaticMemory(parameter_bytes=parameter_bytes))


def random_dag(seed: int, *, num_nodes: int, sizes: Sequence[int] = (0, 1, 2, 3, 5, 8)) -> Graph:
    """A random DAG without phases: up to three inputs among the five nodes before; several sinks, some dead."""
    rng = random.Random(seed)
    nodes: list[Node] = []
    values: list[Value] = []
    for i in range(num_nodes):
        recent = range(max(0, i - 5), i)
        inputs = sorted(rng.sample(recent, min(rng.randint(0, 3), len(recent))))
        nodes.append(node(f"n{i}", Phase.FORWARD, inputs, [i]))
        values.append(Value(f"v{i}", rng.choice(sizes), i))
    return Graph(tuple(nodes), tuple(values))
