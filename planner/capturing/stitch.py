"""A model's joint graph and that of its loss -> the graph of the whole step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from cost_models.work import Work
from planner.capturing.reading import Calls, OutputRole, Reading
from planner.graph import Graph, Node, Phase, Value, ValueKind


def stitch(model: Reading, loss: Reading, *, tangents_stay: bool) -> tuple[Graph, tuple[Calls, ...]]:
    """Put the loss's own forward and backward between the model's.

    The loss runs in eager mode: its values cannot be rematerialized. The gradients that it hands over die when
    the model's backward has read them; the model's outputs stay with the caller.

    Args:
        model: its joint graph.
        loss: the joint graph of the loss as a function of the model's flat outputs.
        tangents_stay: the gradients that the loss hands over stay until backward ends.

    Returns:
        The whole step, and the calls of each of its nodes.
    """
    joined = _Joined()
    forward = range(model.graph.num_forward)
    model_values: dict[int, int] = {}
    joined.append(model.graph, forward, model_values)
    loss_values: dict[int, int] = {}
    joined.append(_as_eager_holds(loss), range(len(loss.graph.nodes)), loss_values, phase=Phase.LOSS)
    gradients = {
        f.index: f.node for f in loss.traced.outputs if f.role is OutputRole.GRADIENT and f.node is not None
    }
    tangents: dict[int, tuple[int, ...]] = {}
    for placeholder, index in model.traced.tangents.items():
        if index in gradients:
            shown = loss.shows.get(gradients[index], ())
            tangents[index] = tuple(loss_values[v] for v in shown if v >= 0)
        else:
            # Autograd fills in zeros for an output that the loss does not read.
            size = sum(size for _, size in model.traced.storages[placeholder])
            tangents[index] = (joined.zeros(f"zeros_{placeholder.name}", size),)
    if tangents_stay:
        for v in (v for shown in tangents.values() for v in shown):
            joined.values[v] = dataclasses.replace(joined.values[v], kind=ValueKind.OUTPUT)
    backward = range(len(forward), len(model.graph.nodes))
    joined.append(model.graph, backward, model_values, tangents=tangents, reads=model.tangents_read)
    graph = Graph(tuple(joined.nodes), tuple(joined.values))
    calls = [model.calls_run(index) for index in range(len(model.calls))]
    between: list[Calls] = [(call,) for call in loss.calls]
    between += [(None,)] * (len(joined.nodes) - len(calls) - len(between))
    return graph, (*calls[: len(forward)], *between, *calls[len(forward) :])


def _as_eager_holds(loss: Reading) -> Graph:
    """The loss's graph with the lifetimes that eager gives its values.

    In forward a function's locals live until it returns; in backward everything that one node of autograd reads or
    makes on the way lives until that node is done. The last operation of each such group reads it all.
    """
    graph = loss.graph

    def node_of_autograd(index: int) -> object:
        call = loss.calls[index]
        if graph.nodes[index].phase is not Phase.BACKWARD:
            return "forward"
        return index if call is None else ("backward", call.meta.get("seq_nr", index))

    nodes = list(graph.nodes)
    for _, group in itertools.groupby(range(len(nodes)), key=node_of_autograd):
        members = list(group)
        last = nodes[members[-1]]
        there = [v for index in members for v in (*graph.nodes[index].inputs, *graph.nodes[index].outputs)]
        held = tuple(v for v in dict.fromkeys((*last.inputs, *there)) if v not in last.outputs)
        nodes[members[-1]] = dataclasses.replace(last, inputs=held)
    return Graph(tuple(nodes), graph.values)


class _Joined:
    """Nodes and values of several graphs, renumbered."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[Value] = []

    def append(
        self,
        graph: Graph,
        members: Iterable[int],
        new: dict[int, int],
        *,
        phase: Phase | None = None,
        tangents: Mapping[int, tuple[int, ...]] | None = None,
        reads: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Add nodes with their values; `new` maps old value numbers to new ones and grows."""
        for index in members:
            node = graph.nodes[index]
            for v in node.outputs:
                value = graph.values[v]
                inner = phase is not None and value.kind is ValueKind.GRADIENT
                kind = ValueKind.ACTIVATION if inner else value.kind
                new[v] = len(self.values)
                self.values.append(dataclasses.replace(value, node=len(self.nodes), kind=kind))
            inputs = [new[v] for v in node.inputs]
            for read in (reads or {}).get(index, ()):
                inputs += (tangents or {}).get(read, ())
            self.nodes.append(
                dataclasses.replace(
                    node,
                    phase=phase or node.phase,
                    can_rematerialize=node.can_rematerialize and phase is None,
                    inputs=tuple(dict.fromkeys(inputs)),
                    outputs=tuple(new[v] for v in node.outputs),
                )
            )

    def zeros(self, name: str, size_bytes: int) -> int:
        """Add a node that fills one value with zeros; its number."""
        self.values.append(Value(name, size_bytes, len(self.nodes)))
        work = Work(flop=0.0, read_bytes=0, written_bytes=size_bytes, dtype="float32", kind="elementwise")
        self.nodes.append(Node(name, "aten.zeros", Phase.LOSS, (), (len(self.values) - 1,), work, False))
        return len(self.values) - 1
