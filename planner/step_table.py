"""The step's graph as columns inside a plan's file, so that a plan explains itself without torch or the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from cost_models.work import Work
from planner.costed import CostedGraph
from planner.graph import Graph, Node, Phase, Value, ValueKind

_NO_WORK = Work(flop=0.0, read_bytes=0, written_bytes=0, dtype="float32", kind="elementwise")
_PHASES = tuple(Phase)


class StepTable(BaseModel):
    """Nodes and values of a costed graph, one column an attribute.

    Attributes:
        names: of the nodes.
        op_names: operators, each once.
        ops: index into `op_names` for each node.
        layer_names: qualified names of modules, each once.
        layers: index into `layer_names` for each node.
        phases: 0 forward, 1 loss, 2 backward, for each node.
        time_s: seconds of each node.
        inputs: values that each node reads.
        workspace_bytes: of each node.
        sizes_bytes: of each value.
        makers: node that makes each value.
        held: values that the caller holds once they are made.
        first_run_only: values that a second run does not make.
        run_once: nodes that may not run again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...]
    op_names: tuple[str, ...]
    ops: tuple[int, ...]
    layer_names: tuple[str, ...]
    layers: tuple[int, ...]
    phases: tuple[int, ...]
    time_s: tuple[float, ...]
    inputs: tuple[tuple[int, ...], ...]
    workspace_bytes: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    makers: tuple[int, ...]
    held: tuple[int, ...]
    first_run_only: tuple[int, ...]
    run_once: tuple[int, ...]

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        num_nodes = len(self.names)
        columns = (self.ops, self.layers, self.phases, self.time_s, self.inputs, self.workspace_bytes)
        if any(len(column) != num_nodes for column in columns):
            raise ValueError(f"every column must have one entry for each of the {num_nodes} nodes")
        if len(self.makers) != len(self.sizes_bytes):
            raise ValueError("every value must have a size and a maker")
        for indices, stop in (
            (self.ops, len(self.op_names)),
            (self.layers, len(self.layer_names)),
            (self.phases, len(_PHASES)),
            (self.makers, num_nodes),
            (self.run_once, num_nodes),
            (self.held + self.first_run_only, len(self.makers)),
        ):
            if any(not 0 <= index < stop for index in indices):
                raise ValueError(f"an index is not between 0 and {stop - 1}")
        return self

    @classmethod
    def of(cls, costed: CostedGraph) -> Self:
        """The table of a graph."""
        graph = costed.graph
        op_names, ops = _numbered(node.op for node in graph.nodes)
        layer_names, layers = _numbered(node.layer for node in graph.nodes)
        return cls(
            names=tuple(node.name for node in graph.nodes),
            op_names=op_names,
            ops=ops,
            layer_names=layer_names,
            layers=layers,
            phases=tuple(_PHASES.index(node.phase) for node in graph.nodes),
            time_s=costed.time_s,
            inputs=tuple(node.inputs for node in graph.nodes),
            workspace_bytes=tuple(node.workspace_bytes for node in graph.nodes),
            sizes_bytes=tuple(value.size_bytes for value in graph.values),
            makers=tuple(value.node for value in graph.values),
            held=tuple(v for v, value in enumerate(graph.values) if value.is_held),
            first_run_only=tuple(v for v, value in enumerate(graph.values) if value.first_run_only),
            run_once=tuple(k for k, node in enumerate(graph.nodes) if not node.can_rematerialize),
        )

    def costed_graph(self) -> CostedGraph:
        """The graph again, without the work of its nodes; a value has the name of its maker.

        Raises:
            ValueError: the columns are not those of a graph.
        """
        outputs: list[list[int]] = [[] for _ in self.names]
        for value, maker in enumerate(self.makers):
            outputs[maker].append(value)
        held, once, run_once = set(self.held), set(self.first_run_only), set(self.run_once)
        nodes = tuple(
            Node(
                name=name,
                op=self.op_names[self.ops[k]],
                phase=_PHASES[self.phases[k]],
                inputs=self.inputs[k],
                outputs=tuple(outputs[k]),
                work=_NO_WORK,
                can_rematerialize=k not in run_once,
                workspace_bytes=self.workspace_bytes[k],
                layer=self.layer_names[self.layers[k]],
            )
            for k, name in enumerate(self.names)
        )
        values = tuple(
            Value(
                name=self.names[maker],
                size_bytes=size_bytes,
                node=maker,
                kind=ValueKind.OUTPUT if v in held else ValueKind.ACTIVATION,
                first_run_only=v in once,
            )
            for v, (size_bytes, maker) in enumerate(zip(self.sizes_bytes, self.makers, strict=True))
        )
        return CostedGraph(Graph(nodes, values), self.time_s)


def _numbered(words: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The distinct words in order, and the number of each word."""
    numbers: dict[str, int] = {}
    column = tuple(numbers.setdefault(word, len(numbers)) for word in words)
    return tuple(numbers), column
