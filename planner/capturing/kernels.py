"""The kernels of the code generator inductor: which calls it fuses, and a reading with a node for each kernel."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import fx

from planner.capturing.fusion import fuse
from planner.capturing.loops import ALONE, Loop, Reduced, Role
from planner.capturing.reading import Reading

_POINTWISE = re.compile(r"aten\._to_copy|(aten|prims)\.(full|full_like|scalar_tensor|iota|arange)\.\w+")
_REDUCTIONS = re.compile(r"(aten|prims)\.(sum|mean|amax|amin|var|var_mean|any|all|prod)\.\w+")


def in_kernels(reading: Reading) -> Reading:
    """The reading with a node for each kernel that inductor makes, and a value for what lies between them."""
    loops = [
        ALONE
        if call is None or call in reading.traced.random or call in reading.traced.opaque
        else loop_of(call)
        for call in reading.calls
    ]
    fused = fuse(reading.graph, loops)
    new_of = {old: new for new, old in enumerate(fused.values)}
    members = tuple(tuple(reading.calls[m] for m in inside) for inside in fused.members)
    return dataclasses.replace(
        reading,
        graph=fused.graph,
        calls=tuple(calls[-1] for calls in members),
        members=members,
        owners=tuple(reading.owners[old] for old in fused.values),
        shows={
            node: tuple(v if v < 0 else new_of[v] for v in values if v < 0 or v in new_of)
            for node, values in reading.shows.items()
        },
        tangents_read={
            index: tuple(dict.fromkeys(t for m in inside for t in reading.tangents_read.get(m, ())))
            for index, inside in enumerate(fused.members)
        },
    )


def loop_of(call: fx.Node) -> Loop:
    """The loop of one call, from its operator and the shapes that the trace recorded."""
    operator, val = call.target, call.meta.get("val")
    if not isinstance(operator, torch._ops.OpOverload) or operator._schema.is_mutable:
        return ALONE
    tensors = [t for t in (val if isinstance(val, list | tuple) else (val,)) if isinstance(t, torch.Tensor)]
    if not tensors or any(t.is_complex() or t.layout is not torch.strided for t in tensors):
        return ALONE
    name = str(operator)
    if _REDUCTIONS.fullmatch(name):
        return _reduction(call, tensors[0])
    if torch.Tag.nondeterministic_seeded in operator.tags or len(tensors) != 1:
        return ALONE
    if torch.Tag.pointwise in operator.tags or _POINTWISE.match(name):
        return Loop(Role.POINTWISE, tensors[0].numel(), tensors[0].numel())
    return ALONE


def _reduction(call: fx.Node, made: torch.Tensor) -> Loop:
    read = call.args[0].meta["val"] if isinstance(call.args[0], fx.Node) else None
    if not isinstance(read, torch.Tensor) or read.numel() == 0:
        return ALONE
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    dims = [given] if isinstance(given, int) else given
    if not isinstance(dims, list | tuple) or not dims:
        dims = range(read.dim())
    summed = {dim % read.dim() for dim in dims if isinstance(dim, int)} if read.dim() else set()
    real = [dim for dim in range(read.dim()) if read.shape[dim] > 1]
    kept = [dim for dim in real if dim not in summed]
    inner = kept and all(dim > kept[-1] for dim in real if dim in summed)
    num_made = math.prod(read.shape[dim] for dim in kept)
    assert num_made == made.numel(), f"{call.name} reduces {read.shape} to {made.shape}"
    return Loop(Role.REDUCTION, read.numel(), num_made, Reduced.INNER if inner else Reduced.OUTER)
