"""A traced joint graph -> nodes and values: views folded away, one value a storage."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import fx

from cost_models.work import Work
from planner.capturing.op_work import work_of
from planner.capturing.reading import OutputRole, Reading, Traced
from planner.graph import Graph, Node, Phase, Value, ValueKind

BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


class _Builder:
    """Collects nodes and values in order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.calls: list[fx.Node | None] = []
        self.values: list[Value] = []
        self.owners: list[fx.Node] = []
        self.value_of_storage: dict[int, int] = {}
        self.shows: dict[fx.Node, tuple[int, ...]] = {}
        self.views: set[fx.Node] = set()
        self.tangents_read: dict[int, tuple[int, ...]] = {}
        self._counted: set[fx.Node] = set()

    def num_views_for(self, call: fx.Node) -> int:
        """Views that a call reads, and those that they are made of, if no call before has read them."""
        stack, found = list(call.all_input_nodes), 0
        while stack:
            node = stack.pop()
            if node in self.views and node not in self._counted:
                self._counted.add(node)
                found += node.target is not operator.getitem
                stack.extend(node.all_input_nodes)
        return found

    def layer_of(self, call: fx.Node, traced: Traced, inputs: Iterable[int]) -> str:
        """Its module; a sum of gradients, which is of none, belongs where its first input was made."""
        layer = traced.layers[call]
        if layer or call not in traced.backward:
            return layer
        return next((self.nodes[self.values[v].node].layer for v in inputs if v >= 0), "")


def read_joint(traced: Traced) -> Reading:
    """Read a joint graph as nodes and values.

    A call that shows only storage of its inputs is a view: it costs nothing and is no node. Forward calls come
    first, then backward ones, each in the order of the trace. Calls that no output needs are dropped, but for
    random ones: what is drawn after them depends on them.

    Args:
        traced: the joint graph.

    Returns:
        Graph and the way back.
    """
    needed = ancestors([*(f.node for f in traced.outputs if f.node is not None), *traced.random])
    needed |= {state for call, state in traced.states.items() if call in needed}
    calls = [n for n in traced.module.graph.nodes if n.op == "call_function" and n in needed]
    overwritten = {f.mutated for f in traced.outputs if f.mutated is not None}
    builder = _Builder()
    for placeholder, index in traced.tangents.items():
        # A tangent is no value of this graph: it is known by a negative number until the loss is put in.
        builder.value_of_storage |= {key: -index - 1 for key, _ in traced.storages[placeholder]}
        builder.shows[placeholder] = (-index - 1,)
    static = {
        key for n in traced.module.graph.nodes if n.op != "call_function" for key, _ in traced.storages[n]
    }
    backward = _backward_calls(traced, calls)
    for phase, members in (
        (Phase.FORWARD, [n for n in calls if n not in backward]),
        (Phase.BACKWARD, [n for n in calls if n in backward]),
    ):
        for call in members:
            _read_call(builder, traced, call, phase, static, overwritten)
        if phase is Phase.FORWARD:
            _end_forward(builder, traced)
    _mark_held(builder, traced)
    plain = [f for f in traced.outputs if f.role is OutputRole.PLAIN]
    plain += [f for f in traced.outputs if f.role is OutputRole.OTHER]
    vals = [f.node.meta.get("val") if f.node is not None else f.constant for f in plain]
    return Reading(
        traced=traced,
        graph=Graph(tuple(builder.nodes), tuple(builder.values)),
        calls=tuple(builder.calls),
        owners=tuple(builder.owners),
        shows=builder.shows,
        views=frozenset(builder.views),
        tangents_read=builder.tangents_read,
        output_vals=tuple(vals),
        views_out=_views_out(traced, [f.node for f in plain], builder.views),
    )


def _views_out(
    traced: Traced, outputs: list[fx.Node | None], views: set[fx.Node]
) -> dict[int, tuple[int, tuple[fx.Node, ...]]]:
    """Outputs that are views of others: autograd adds their gradients up outside of the graph."""
    differentiable = set(traced.tangents.values())
    root_of = {outputs[index]: index for index in differentiable}
    found: dict[int, tuple[int, tuple[fx.Node, ...]]] = {}
    for index, node in enumerate(outputs):
        calls: list[fx.Node] = []
        while node is not None and node not in root_of and node in views:
            calls.append(node)
            node = next(iter(node.all_input_nodes), None)
        if index not in differentiable and node in root_of and calls:
            found[index] = root_of[node], tuple(reversed(calls))
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything they depend on."""
    stack = list(nodes)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _backward_calls(traced: Traced, calls: list[fx.Node]) -> set[fx.Node]:
    """Calls that need a gradient from outside, or were traced in backward and no forward output needs them."""
    forward_outputs = [
        f.node for f in traced.outputs if f.role is not OutputRole.GRADIENT and f.node is not None
    ]
    for_forward = ancestors(forward_outputs)
    late: set[fx.Node] = set(traced.tangents)
    for call in calls:
        if call not in for_forward and (
            call in traced.backward or any(i in late for i in call.all_input_nodes)
        ):
            late.add(call)
    return late


def _read_call(
    builder: _Builder,
    traced: Traced,
    call: fx.Node,
    phase: Phase,
    static: set[int],
    overwritten: set[fx.Node],
) -> None:
    """Add one call as a node, or note it as a view.

    What reads an input that is overwritten when forward ends cannot run again; views of it join the set. Batch
    norm in training mode can: its output does not depend on the running statistics.
    """
    reads_overwritten = any(i in overwritten for i in call.all_input_nodes)
    read = [*call.all_input_nodes, *([traced.states[call]] if call in traced.states else [])]
    inputs = dict.fromkeys(v for i in read for v in builder.shows.get(i, ()))
    storages = traced.storages[call]
    fresh = {key for key, _ in storages if key not in static and key not in builder.value_of_storage}
    if storages and not fresh:
        builder.views.add(call)
        if reads_overwritten:
            overwritten.add(call)
    else:
        index = len(builder.nodes)
        made = []
        batch_norm = call.target is BATCH_NORM and bool(call.args[5])
        builder.tangents_read[index] = tuple(-v - 1 for v in inputs if v < 0)
        for position, (key, size) in enumerate(storages):
            if key not in fresh or key in builder.value_of_storage:
                continue
            builder.value_of_storage[key] = len(builder.values)
            made.append(len(builder.values))
            builder.values.append(
                Value(
                    call.name if len(storages) == 1 else f"{call.name}.{position}",
                    size,
                    index,
                    first_run_only=batch_norm and position >= 3,
                )
            )
            builder.owners.append(_owner(call, position, num_tensors=len(storages)))
        is_random = call in traced.random
        may_repeat = call in traced.states or not is_random
        may_repeat &= call not in traced.opaque and (batch_norm or not reads_overwritten)
        builder.nodes.append(
            Node(
                name=call.name,
                op=str(call.target),
                phase=phase,
                inputs=tuple(v for v in inputs if v >= 0),
                outputs=tuple(made),
                work=work_of(call),
                can_rematerialize=may_repeat and phase is Phase.FORWARD,
                # While it is replayed the generator's present state is put by.
                workspace_bytes=sum(size for _, size in traced.storages[traced.states[call]])
                if call in traced.states
                else 0,
                keeps_place=is_random or not may_repeat,
                layer=builder.layer_of(call, traced, inputs),
                num_views=builder.num_views_for(call),
            )
        )
        builder.calls.append(call)
    builder.shows[call] = tuple(
        dict.fromkeys(builder.value_of_storage[key] for key, _ in storages if key in builder.value_of_storage)
    )


def _owner(call: fx.Node, position: int, *, num_tensors: int) -> fx.Node:
    """The FX node of one tensor of a call: the call itself, or its getitem."""
    if num_tensors == 1 and isinstance(call.meta.get("val"), torch.Tensor):
        return call
    tensors = [i for i, leaf in enumerate(call.meta["val"]) if isinstance(leaf, torch.Tensor)]
    for user in call.users:
        if getattr(user.target, "__name__", "") == "getitem" and user.args[1] == tensors[position]:
            return user
    return call


def _end_forward(builder: _Builder, traced: Traced) -> None:
    """Forward ends with copying the new contents of mutated inputs."""
    copies = [f.node for f in traced.outputs if f.role is OutputRole.MUTATION and f.node is not None]
    inputs = dict.fromkeys(v for node in copies for v in builder.shows.get(node, ()))
    if inputs:
        size = sum(builder.values[v].size_bytes for v in inputs)
        work = Work(flop=0.0, read_bytes=size, written_bytes=size, dtype="float32", kind="copy")
        builder.nodes.append(
            Node(
                "end_of_forward",
                "lowtide.copy_mutations",
                Phase.FORWARD,
                tuple(inputs),
                (),
                work,
                can_rematerialize=False,
                keeps_place=True,
            )
        )
        builder.calls.append(None)


def _mark_held(builder: _Builder, traced: Traced) -> None:
    """What the caller receives stays: forward outputs and gradients."""
    for output in traced.outputs:
        if output.node is None or output.role is OutputRole.MUTATION:
            continue
        kind = ValueKind.GRADIENT if output.role is OutputRole.GRADIENT else ValueKind.OUTPUT
        for v in builder.shows.get(output.node, ()):
            if v < 0:
                continue
            builder.values[v] = dataclasses.replace(builder.values[v], kind=kind)
