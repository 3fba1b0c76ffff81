"""One training step as plain data: values (storages), nodes, and the graph of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from cost_models.work import Work


class Phase(Enum):
    """Part of the step that a node belongs to; nodes are listed in this order."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"


class ValueKind(Enum):
    """What holds a value alive besides its uses."""

    ACTIVATION = "activation"  # nothing
    OUTPUT = "output"  # the caller: a forward output lives to the end of the step
    GRADIENT = "gradient"  # the caller: a returned gradient lives to the end of the step


@dataclass(frozen=True, slots=True)
class Value:
    """One storage that a node allocates. Views of it are not values of their own.

    Attributes:
        name: of the tensor that owns the storage, as in the captured graph.
        size_bytes: of the storage.
        node: index of the node that makes it.
        kind: what holds it alive besides its uses.
        first_run_only: a second run of its node does not make it (the new running statistics of batch norm).
    """

    name: str
    size_bytes: int
    node: int
    kind: ValueKind = ValueKind.ACTIVATION
    first_run_only: bool = False

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            raise ValueError(f"value {self.name!r}: size_bytes must be >= 0, got {self.size_bytes}")

    @property
    def is_held(self) -> bool:
        """Once made, it stays to the end of the step, whatever the schedule."""
        return self.kind is not ValueKind.ACTIVATION


@dataclass(frozen=True, slots=True)
class Node:
    """One operation that allocates or computes; views are folded into the values they show.

    Attributes:
        name: unique, as in the captured graph.
        op: operator, such as ``aten.mm.default``.
        phase: forward, loss or backward.
        inputs: indices of the values that it reads; parameters and inputs of the step are not values.
        outputs: indices of the values that it makes.
        work: its demand, for a cost model.
        can_rematerialize: running it twice gives the same bits and has no other effect.
        workspace_bytes: allocated and freed while it runs, besides inputs and outputs.
        layer: qualified name of the module that it comes from, "" if unknown.
        keeps_place: it is not reordered among others of its kind: random, or with an effect besides its outputs.
        then: demand of further operations, each in the memory of the output of the one before.
        num_views: calls that only look at memory, made for this node: they take the time of a call.
    """

    name: str
    op: str
    phase: Phase
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    work: Work
    can_rematerialize: bool = True
    workspace_bytes: int = 0
    layer: str = ""
    keeps_place: bool = False
    then: tuple[Work, ...] = ()
    num_views: int = 0


@dataclass(frozen=True)
class Graph:
    """A training step: nodes in execution order (forward, loss, backward) and the values they make.

    Raises:
        ValueError: an index out of range, a value used before it is made, two makers of one value,
            phases out of order.
    """

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        made: set[int] = set()
        order = list(Phase)
        last = 0
        for index, node in enumerate(self.nodes):
            phase = order.index(node.phase)
            if phase < last:
                raise ValueError(
                    f"node {node.name!r} is {node.phase.value}, after a node of phase {order[last].value}"
                )
            last = phase
            for value in node.inputs:
                if value not in made:
                    raise ValueError(f"node {node.name!r} reads value {value} before it is made")
            for value in node.outputs:
                if not 0 <= value < len(self.values):
                    raise ValueError(f"node {node.name!r} makes value {value}; there are {len(self.values)}")
                if value in made or self.values[value].node != index:
                    raise ValueError(f"value {self.values[value].name!r} must be made once, by its own node")
                made.add(value)
        if len(made) != len(self.values):
            raise ValueError("every value must be made by a node")

    @cached_property
    def num_forward(self) -> int:
        """Nodes of the forward phase; they come first."""
        return sum(node.phase is Phase.FORWARD for node in self.nodes)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each value the nodes that read it, in execution order."""
        users: list[list[int]] = [[] for _ in self.values]
        for index, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.inputs):
                users[value].append(index)
        return tuple(tuple(row) for row in users)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over structure, sizes and operators: equal graphs, equal digests."""
        return digest_of(
            [[n.name, n.op, n.phase.value, n.inputs, n.outputs, n.can_rematerialize] for n in self.nodes]
            + [[v.name, v.size_bytes, v.kind.value, v.first_run_only] for v in self.values]
        )


def digest_of(rows: Sequence[object]) -> str:
    """SHA-256 (hex) of JSON-serializable rows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
