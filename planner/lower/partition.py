"""Cut a joint graph into forward and backward, in the order of a schedule, rematerializing as it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _BoxedCodeGen
from torch.fx.node import map_arg

from planner.capturing.joint_reader import BATCH_NORM
from planner.capturing.reading import OutputRole, Reading
from planner.lower.random_replay import replay
from planner.lower.recurrent import LSTM_LAYER, lstm_layer
from planner.schedule import Compute, Free, Instruction, Schedule

# In training mode batch norm's output does not depend on the running statistics that it updates: a second run
# leaves them alone.
_BATCH_NORM_AGAIN = torch.ops.aten._native_batch_norm_legit.no_stats

# On a call of a half: (name of the kernel that it is part of, number that no other run of a kernel has).
KERNEL = "lowtide_kernel"
# On a call of a half: name of the node of the graph that it runs for.
PART_OF = "lowtide_node"


def partition(reading: Reading, schedule: Schedule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward modules with the calling convention of AOTAutograd.

    Forward returns the joint graph's forward outputs and then what backward needs; backward takes that and the
    tangents. Values that the schedule holds across the cut are saved as the tensors that own them; views are
    made again where they are read. Parameters and inputs that backward reads are passed on.

    Args:
        reading: the model's joint graph.
        schedule: instructions over `reading.graph`, without the loss.

    Returns:
        (forward, backward).
    """
    graph = reading.graph
    cut = schedule.instructions.index(Compute(graph.num_forward - 1)) + 1
    while cut < len(schedule.instructions) and isinstance(schedule.instructions[cut], Free):
        cut += 1
    forward = _Half(reading, tangents=False)
    forward.run(schedule.instructions[:cut])
    backward = _Half(reading, tangents=True)
    backward.run(schedule.instructions[cut:])
    backward_module = backward.finish(
        [f.node for f in reading.traced.outputs if f.role is OutputRole.GRADIENT]
    )
    outputs = [f.node or f.constant for f in reading.traced.outputs if f.role is not OutputRole.GRADIENT]
    return forward.finish([*outputs, *backward.taken]), backward_module


class _Half:
    """One of the two graphs while it is written.

    Attributes:
        taken: nodes of the joint graph that backward receives from forward, in order.
    """

    def __init__(self, reading: Reading, *, tangents: bool) -> None:
        self.reading = reading
        self.is_backward = tangents
        self.graph = fx.Graph()
        self.here: dict[fx.Node, fx.Node] = {}
        self.taken: list[fx.Node] = []
        self.returned: dict[fx.Node, fx.Node] = {}
        # What was written since the last kernel began: node of the joint graph, node here.
        self.written: list[tuple[fx.Node, fx.Node]] = []
        self.num_kernels = 0
        self.owner_of = {node: v for v, node in enumerate(reading.owners)}
        self.shown_by: dict[int, list[fx.Node]] = {}
        for node, values in reading.shows.items():
            for v in values:
                self.shown_by.setdefault(v, []).append(node)
        for node in reading.traced.module.graph.nodes:
            if (
                node.op == "placeholder"
                and (node in reading.traced.tangents or _is_tangent(node)) == tangents
            ):
                self.here[node] = self._copy(node)
        self.anchor = next(iter(self.graph.nodes), None)
        # Calls that ran before, here or in the other half.
        self.ran: set[fx.Node | None] = set()
        if tangents:
            self.ran.update(*map(reading.calls_run, range(reading.graph.num_forward)))

    def run(self, instructions: Iterable[Instruction]) -> None:
        """Write the calls in order; a freed value is forgotten with all its views."""
        for step in instructions:
            if isinstance(step, Free):
                for node in self.shown_by.get(step.value, ()):
                    self.here.pop(node, None)
                continue
            calls = self.reading.calls_run(step.node)
            if self.reading.members and len(self.reading.members[step.node]) > len(calls):
                self.emit_kernel(step.node)
            elif calls == (None,):
                mutations = (f.node for f in self.reading.traced.outputs if f.role is OutputRole.MUTATION)
                self.returned = {node: self.fetch(node) for node in mutations if node is not None}
            else:
                self.emit_in_place(step.node)

    def emit_in_place(self, node: int) -> None:
        """Write the calls of one node; each after the first runs in the memory of the one before."""
        for call in self.reading.calls_run(node):
            assert call is not None
            overwrite = self.reading.overwrites.get(call)
            if overwrite is not None and call in self.here:
                continue  # the node runs again for another output; this one is there
            self.written = []
            gone = []
            if overwrite is not None:
                (lies_in,) = self.reading.shows[call]
                gone = [shown for shown in self.shown_by[lies_in] if shown in self.here]
            self.emit(call, again=call in self.ran)
            self.ran.add(call)
            for _, new in self.written:
                new.meta[PART_OF] = self.reading.graph.nodes[node].name
            for shown in gone:
                del self.here[shown]

    def emit_kernel(self, node: int) -> None:
        """Write the calls of one kernel, marked as such; afterwards only what it makes for others is there."""
        kernel = self.reading.graph.nodes[node]
        owners = [self.reading.owners[v] for v in kernel.outputs]
        outputs = {owner: self.here.get(owner) for owner in owners}
        self.written = []
        for call in self.reading.members[node]:
            assert call is not None
            self.emit(call, again=False)
        self.num_kernels += 1
        for written, new in self.written:
            new.meta[KERNEL] = (kernel.name, self.num_kernels)
            there = outputs.get(written)
            if there is not None:
                # It is there already: the second one is not made.
                self.here[written] = there
            elif written not in outputs:
                self.here.pop(written, None)

    def emit(self, call: fx.Node, *, again: bool) -> None:
        """Write one call and, right behind it, the getitems that take its outputs apart."""
        target: Any = call.target
        args, num_outputs = call.args, None
        if again and target is BATCH_NORM:
            target, args, num_outputs = _BATCH_NORM_AGAIN, (*args[:3], *args[5:]), 3
        elif target is LSTM_LAYER:
            target = lstm_layer
        args, kwargs = map_arg(args, self.fetch), map_arg(call.kwargs, self.fetch)
        if again and call in self.reading.traced.states:
            state = self.reading.traced.states[call]
            kwargs = {**kwargs, "replayed_device": state.args[0]}
            target, args = replay, (self.fetch(state), target, *args)
        overwrite = self.reading.overwrites.get(call)
        if overwrite is not None:
            target = overwrite.operator
            if overwrite.position == 1:
                args = (args[1], args[0], *args[2:])
        new = self.here[call] = self.graph.create_node("call_function", target, args, kwargs, name=call.name)
        new.meta = dict(call.meta)
        self.written.append((call, new))
        for user in call.users:
            position = user.args[1] if _is_getitem(user) else None
            if user in self.here or not isinstance(position, int):
                continue
            if num_outputs is not None and position >= num_outputs:
                continue
            taken = self.graph.create_node("call_function", user.target, (new, position), {}, name=user.name)
            taken.meta = dict(user.meta)
            self.here[user] = taken
            self.written.append((user, taken))

    def fetch(self, node: fx.Node) -> fx.Node:
        """The node of this half that stands for a node of the joint graph; views are written on demand."""
        if node in self.here:
            return self.here[node]
        if node.op == "get_attr":
            self.here[node] = self._copy(node)
        elif node.op == "placeholder" or node in self.owner_of:
            self.here[node] = self._take(node)
        elif node in self.reading.views:
            args = map_arg(node.args, self.fetch)
            kwargs = map_arg(node.kwargs, self.fetch)
            new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
            new.meta = dict(node.meta)
            self.here[node] = new
            self.written.append((node, new))
        else:
            raise AssertionError(f"{node.name} is read where it is not there")
        return self.here[node]

    def finish(self, outputs: Sequence[Any]) -> fx.GraphModule:
        """Close the graph; the generated code drops every name after its last use, arguments included."""
        self.graph.output(
            tuple(
                (self.returned.get(out) or self.fetch(out)) if isinstance(out, fx.Node) else out
                for out in outputs
            )
        )
        self.graph.set_codegen(_BoxedCodeGen())
        module = fx.GraphModule(self.reading.traced.module, self.graph)
        module.recompile()
        return module

    def _take(self, node: fx.Node) -> fx.Node:
        """Receive a tensor from forward."""
        assert self.is_backward, f"{node.name} is read in forward before it is made"
        self.taken.append(node)
        if self.anchor is None:
            new = self.graph.placeholder(node.name)
        else:
            with self.graph.inserting_before(self.anchor):
                new = self.graph.placeholder(node.name)
        # Where a call has taken its name it has another one. The argument takes that as well: code that begins with
        # "b = a; c = b" loses the argument that came in as b.
        new.target = new.name
        new.meta = dict(node.meta)
        return new

    def _copy(self, node: fx.Node) -> fx.Node:
        new = self.graph.create_node(node.op, node.target, node.args, node.kwargs, name=node.name)
        new.meta = dict(node.meta)
        return new


def _is_tangent(node: fx.Node) -> bool:
    return node.name.startswith("tangents")


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
