"""Pointwise calls that write over an input that nothing else reads: one node with the call that made the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner.capturing.op_work import in_place
from planner.capturing.reading import Calls, Overwrite, Reading
from planner.graph import Graph, Node, Phase, Value

# A sum does not depend on the order of its inputs, so the second one may be written over as well.
_SUM = torch.ops.aten.add.Tensor


def with_overwrites(reading: Reading) -> Reading:
    """The reading in which a call takes over the memory of an input where that loses nothing.

    Eager mode does so where a module says ``inplace=True`` and where autograd adds up gradients; a graph without
    side effects needs new memory each time. An input that one pointwise call alone reads, as large as the result,
    is of no more use than the result: its maker and the call become one node, which runs where the maker runs.
    Nothing that could be retained is lost by that, neither bytes nor time.

    Args:
        reading: of single calls.

    Returns:
        The same step with fewer nodes and values; `Reading.overwrites` says which calls write over what.
    """
    groups = _Groups(reading)
    for index in range(len(reading.graph.nodes)):
        groups.add(index)
    return groups.reading() if groups.overwrites else reading


@dataclass
class _Group:
    """A node while it grows: nodes of the reading, and the values that it makes for others."""

    nodes: list[int]
    inputs: list[int]
    outputs: list[int]


class _Groups:
    """The nodes so far, each in the place of its first call."""

    def __init__(self, reading: Reading) -> None:
        self.old = reading
        self.groups: list[_Group] = []
        self.group_of: dict[int, int] = {}  # value -> its maker among the groups
        self.last_of: dict[int, int] = {}  # value that was written over -> what lies there now
        self.overwrites: dict[fx.Node, Overwrite] = {}

    def add(self, index: int) -> None:
        """Add a node of the reading: to the group that makes the input that it writes over, or as a new one."""
        node = self.old.graph.nodes[index]
        places = self._places(index)
        # The input made last: whatever else is read must be there before its maker runs.
        for at, argument in sorted(places.items(), key=lambda place: -self.group_of[place[0]]):
            home = self.group_of[at]
            others = [v for v in node.inputs if v != at]
            if all(self.group_of[v] < home for v in others):
                group = self.groups[home]
                (made,) = node.outputs
                group.nodes.append(index)
                group.inputs = list(dict.fromkeys([*group.inputs, *others]))
                group.outputs[group.outputs.index(at)] = made
                self.group_of[made] = home
                self.last_of[at] = made
                call = self.old.calls[index]
                assert call is not None
                self.overwrites[call] = argument
                return
        for v in node.outputs:
            self.group_of[v] = len(self.groups)
        self.groups.append(_Group([index], list(node.inputs), list(node.outputs)))

    def _places(self, index: int) -> Mapping[int, Overwrite]:
        """Values that a node may write over -> how."""
        graph, call = self.old.graph, self.old.calls[index]
        node = graph.nodes[index]
        if call is None or call in self.old.traced.opaque or call in self.old.traced.random:
            return {}
        writes = in_place_of(call.target)
        if writes is None or len(node.outputs) != 1 or not _same_bits_in_place(call):
            return {}
        found: dict[int, Overwrite] = {}
        for position in (0, 1) if call.target == _SUM and not call.kwargs else (0,):
            argument = call.args[position]
            if not isinstance(argument, fx.Node):
                continue
            shown = self.old.shows.get(argument, ())
            if len(shown) != 1 or shown[0] < 0 or not self._ends_here(shown[0], index):
                continue
            arguments = [n for n in call.all_input_nodes if shown[0] in self.old.shows.get(n, ())]
            if arguments == [argument] and call.args.count(argument) == 1 and _alike(argument, call):
                sizes = [graph.values[v].size_bytes for v in (*shown, *node.outputs)]
                val = call.meta["val"]
                if sizes == [val.numel() * val.element_size()] * 2:
                    found[shown[0]] = Overwrite(argument, writes, position)
        return found

    def _ends_here(self, v: int, index: int) -> bool:
        """Whether nothing but one node reads a value, in the same part of the step."""
        graph = self.old.graph
        value, node = graph.values[v], graph.nodes[index]
        return (
            graph.users[v] == (index,)
            and not value.is_held
            and not value.first_run_only
            and graph.nodes[value.node].phase is node.phase is not Phase.LOSS
        )

    def reading(self) -> Reading:
        """Everything numbered anew."""
        graph = self.old.graph
        nodes: list[Node] = []
        values: list[Value] = []
        olds: list[int] = []
        new_of: dict[int, int] = {}
        for group in self.groups:
            for v in group.outputs:
                new_of[v] = len(values)
                values.append(dataclasses.replace(graph.values[v], node=len(nodes)))
                olds.append(v)
            calls = [self.old.calls[m] for m in group.nodes[1:]]
            later = [str(self.overwrites[call].operator) for call in calls if call is not None]
            nodes.append(_node([graph.nodes[m] for m in group.nodes], later, group, new_of))
        for v in sorted(self.last_of, reverse=True):
            new_of[v] = new_of[self.last_of[v]]
        members: tuple[Calls, ...] = tuple(
            tuple(self.old.calls[m] for m in group.nodes) for group in self.groups
        )
        return dataclasses.replace(
            self.old,
            graph=Graph(tuple(nodes), tuple(values)),
            calls=tuple(calls[-1] for calls in members),
            members=members,
            overwrites=self.overwrites,
            owners=tuple(self.old.owners[v] for v in olds),
            shows={
                node: tuple(v if v < 0 else new_of[v] for v in shown)
                for node, shown in self.old.shows.items()
            },
            tangents_read={
                index: tuple(dict.fromkeys(t for m in group.nodes for t in self.old.tangents_read.get(m, ())))
                for index, group in enumerate(self.groups)
            },
        )


def _node(ops: list[Node], later: list[str], group: _Group, new_of: Mapping[int, int]) -> Node:
    """One operation, and those of the operators `later` in the memory of the one before each."""
    if len(ops) == 1:
        inputs, outputs = (tuple(new_of[v] for v in vs) for vs in (group.inputs, group.outputs))
        return dataclasses.replace(ops[0], inputs=inputs, outputs=outputs)
    return Node(
        name=ops[-1].name,
        op=" + ".join([ops[0].op, *later]),
        phase=ops[0].phase,
        inputs=tuple(new_of[v] for v in group.inputs),
        outputs=tuple(new_of[v] for v in group.outputs),
        work=ops[0].work,
        then=tuple(dataclasses.replace(op.work, operation=in_place(op.work.operation)) for op in ops[1:]),
        can_rematerialize=all(op.can_rematerialize for op in ops),
        workspace_bytes=max(op.workspace_bytes for op in ops),
        layer=next((op.layer for op in ops if op.layer), ""),
        keeps_place=any(op.keeps_place for op in ops),
        num_views=sum(op.num_views for op in ops),
    )


def in_place_of(target: Any) -> torch._ops.OpOverload | None:
    """The operator that computes a pointwise one in the memory of its first argument, None if there is none.

    >>> str(in_place_of(torch.ops.aten.relu.default))
    'aten.relu_.default'
    >>> in_place_of(torch.ops.aten.mm.default) is None
    True
    """
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    found = getattr(packet, target._overloadname, None)
    if found is None or _words(found) != _words(target) or not found._schema.arguments[0].is_write:
        return None
    return found


def _words(operator: torch._ops.OpOverload) -> list[tuple[str, str]]:
    """Name and type of every argument; whether it is written is left out."""
    return [(a.name, str(a.type).replace("(a!)", "")) for a in operator._schema.arguments]


def _same_bits_in_place(call: fx.Node) -> bool:
    """Whether a pointwise call rounds alike in memory of its own and over an argument, without copies.

    Measured over torch's own samples of every operator: complex products round by how they are vectorized, a number
    is rounded to 16 bits first in some operators (``mul_.Scalar``), and an argument of another dtype is copied.
    """
    val = call.meta.get("val")
    if not isinstance(val, torch.Tensor) or not val.dtype.is_floating_point:
        return False
    vals = [node.meta.get("val") for node in call.all_input_nodes]
    if any(not isinstance(other, torch.Tensor) or other.dtype != val.dtype for other in vals):
        return False
    numbers = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, int | float)]
    return not numbers or val.dtype in (torch.float32, torch.float64)


def _alike(argument: fx.Node, call: fx.Node) -> bool:
    """Whether the result has the layout of the argument, which covers memory without gaps."""
    old, new = argument.meta.get("val"), call.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    return (
        (old.dtype, old.device, old.shape, old.stride()) == (new.dtype, new.device, new.shape, new.stride())
        and old.numel() > 0
        and _is_dense(old)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
