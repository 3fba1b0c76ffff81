"""What a joint trace is, and what was read from it: nodes and values, and the way back to FX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from planner.graph import Graph

Calls = tuple[fx.Node | None, ...]


class OutputRole(Enum):
    """What a flat output of the joint graph is for."""

    PLAIN = "plain"  # returned to the caller of forward
    MUTATION = "mutation"  # new content of an input, copied into it when forward ends
    GRADIENT = "gradient"  # returned by backward
    OTHER = "other"  # a forward output for the runtime, such as the base of a returned view


@dataclass(frozen=True)
class FlatOutput:
    """One flat output of the joint graph.

    Attributes:
        role: what it is for.
        node: the tensor, or None (a gradient that does not exist, a constant).
        index: PLAIN: of the output; GRADIENT: of the plain input it belongs to, None for parameters.
        mutated: MUTATION: the placeholder whose content it becomes.
        constant: what forward returns there if it is no tensor.
    """

    role: OutputRole
    node: fx.Node | None
    index: int | None
    mutated: fx.Node | None = None
    constant: Any = None


@dataclass(frozen=True)
class Traced:
    """A joint graph and the facts about it that only torch's internals know.

    Attributes:
        module: the joint graph.
        outputs: flat outputs in order, forward ones first.
        tangents: placeholder -> number in `Reading.output_vals` of the output whose gradient it is.
        storages: node -> (identity, bytes) of the storage of each tensor that it shows.
        backward: calls traced while backward ran.
        random: calls that draw random numbers.
        states: a random call that can be replayed -> the call before it that saves the generator's state.
        opaque: calls that may do more than compute their outputs.
        layers: qualified name of the module that each call comes from.
    """

    module: fx.GraphModule
    outputs: tuple[FlatOutput, ...]
    tangents: Mapping[fx.Node, int]
    storages: Mapping[fx.Node, tuple[tuple[int, int], ...]]
    backward: frozenset[fx.Node]
    random: frozenset[fx.Node]
    states: Mapping[fx.Node, fx.Node]
    opaque: frozenset[fx.Node]
    layers: Mapping[fx.Node, str]


@dataclass(frozen=True)
class Overwrite:
    """How a call writes its result over one of its arguments.

    Attributes:
        argument: that it writes over.
        operator: that does it, to its first argument.
        position: of the argument in the call; 1 where the order does not matter.
    """

    argument: fx.Node
    operator: torch._ops.OpOverload
    position: int


@dataclass(frozen=True)
class Reading:
    """The graph of a joint trace, and the way back from it to FX.

    Attributes:
        traced: what was read.
        graph: nodes and values, forward then backward.
        calls: for each node its FX call; None for the copies that end forward.
        owners: for each value the FX node of the tensor that owns it.
        shows: FX node -> values that its tensors lie in; none for parameters, inputs and their views.
        views: FX nodes that only look at storage made elsewhere.
        tangents_read: node -> plain outputs whose gradient it reads.
        output_vals: fake tensors of the plain outputs by index, then those of the tensors that some of them lie in.
        views_out: plain output without a gradient of its own -> the one that it is a view of, and the calls that
            make the view.
        members: for each node the calls that it computes, in one kernel or in one place; empty where each is its
            own call alone.
        overwrites: the calls that run in the memory of an argument, in the node that makes it.
    """

    traced: Traced
    graph: Graph
    calls: Calls
    owners: tuple[fx.Node, ...]
    shows: Mapping[fx.Node, tuple[int, ...]]
    views: frozenset[fx.Node]
    tangents_read: Mapping[int, tuple[int, ...]]
    output_vals: tuple[Any, ...]
    views_out: Mapping[int, tuple[int, tuple[fx.Node, ...]]]
    members: tuple[Calls, ...] = ()
    overwrites: Mapping[fx.Node, Overwrite] = field(default_factory=dict)

    def calls_run(self, node: int) -> Calls:
        """The calls that run one after the other for a node; of a kernel its last one."""
        return self.members[node] if self.overwrites else (self.calls[node],)
