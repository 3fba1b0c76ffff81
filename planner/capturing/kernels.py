"""The code generator inductor: what it takes apart, which calls it fuses, and a reading in its kernels."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from planner.capturing.fusion import ALONE, Loop, Reduced, Role, fuse
from planner.capturing.reading import Reading

_ATEN, _PRIMS = torch.ops.aten, torch.ops.prims
# Besides pointwise operators: those that are pointwise operations and reductions one after the other.
_TAKEN_APART = re.compile(
    r"(_native|native|_batch|batch|cudnn_batch|miopen_batch|_fused_rms)_\w*norm\w*|_?(log_|safe_)?softmax(_backward_data)?|"
    r"_to_copy|l1_loss|mse_loss\w*|smooth_l1_loss\w*|huber_loss\w*|binary_cross_entropy\w*|soft_margin_loss\w*|"
    r"tril|triu|native_dropout_backward|logsumexp|(zeros|ones|full)_like|new_(zeros|ones|full)|zeros|ones|std|std_mean"
)
_POINTWISE = re.compile(r"aten\._to_copy|(aten|prims)\.(full|full_like|scalar_tensor|iota|arange)\.\w+")
_REDUCTIONS = re.compile(r"(aten|prims)\.(sum|mean|amax|amin|var|var_mean|any|all|prod)\.\w+")


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator -> its parts, for those that inductor fuses the parts of; all others are called as they are.

    What draws random numbers stays whole, and so does what inductor takes apart into scattered writes.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = {
        operator: function
        for operator, function in select_decomp_table().items()
        if _is_taken_apart(operator)
    }
    table[_ATEN.nll_loss_backward.default] = _nll_loss_backward
    return table


def _is_taken_apart(operator: Any) -> bool:
    tags = getattr(operator, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(operator, torch._ops.OpOverload):
        return False
    name = operator._schema.name.removeprefix("aten::")
    return torch.Tag.pointwise in tags or _TAKEN_APART.fullmatch(name) is not None


def _nll_loss_backward(
    grad: torch.Tensor,
    inputs: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the negative log likelihood, element by element: -1 where the class is the target."""
    if inputs.dim() != 2 or weight is not None:
        return NotImplemented
    if reduction == 1:
        grad = grad / total_weight
    classes = torch.arange(inputs.shape[1], device=inputs.device)
    rows = torch.where(target == ignore_index, 0, -grad)
    return torch.where(classes == target.unsqueeze(1), rows.unsqueeze(1), 0).to(inputs.dtype)


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
