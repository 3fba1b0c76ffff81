"""What a plan is valid for, in words that an error can compare one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd.schemas import JointWithDescriptors
from torch._ops import OpOverload
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planner.capturing.reading import Calls, Reading
from planner.graph import digest_of
from planner.lower.tangents import Layouts
from planner.lower.trace import TORCH_VERSION
from planner.plan_file import Signature


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call of the model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Sequence):
        return tuple(inputs), {}
    return (inputs,), {}


def signature_of(
    joint: JointWithDescriptors, model: nn.Module, inputs: Any, *, gradients: Layouts, reading: Reading
) -> Signature:
    """What the joint graph was captured from; of fused kernels also which operations are in each."""
    return Signature(
        torch_version=TORCH_VERSION,
        training=model.training,
        device=device_of(model),
        inputs=input_words(inputs),
        parameters=parameter_words(model),
        gradient_layouts=gradients,
        model_digest=digest_of([*_graph_rows(joint.graph_module), *map(_kernel_row, reading.members)]),
    )


def device_of(model: nn.Module) -> str:
    """Type of the device of the model's first parameter."""
    return next((p.device.type for p in model.parameters()), "cpu")


def parameter_words(model: nn.Module) -> tuple[str, ...]:
    """ "name: dtype [shape]" of every parameter and buffer, "(frozen)" where no gradient is asked."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return tuple(f"{name}: {describe(t)}" + " (frozen)" * (name in frozen) for name, t in tensors)


def input_words(inputs: Any) -> tuple[str, ...]:
    """ "name: dtype [shape]" of every leaf of a model's inputs."""
    args, kwargs = call_arguments(inputs)
    leaves = pytree.tree_flatten_with_path((list(args), kwargs))[0]
    return tuple(
        f"{pytree.keystr(path[1:])}: {describe(leaf)}"
        + " (gradient asked)" * (isinstance(leaf, torch.Tensor) and leaf.requires_grad)
        for path, leaf in leaves
    )


def describe(leaf: Any) -> str:
    """ "float32 [8, 512]" of a tensor, the repr of anything else."""
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    return repr(leaf)


def _graph_rows(module: fx.GraphModule) -> list[str]:
    """One row a call, whatever names the trace gave and in whichever order it takes tuples apart.

    Placeholders are known by their position, calls by their rank among calls, getitems by what they take from what.
    """
    keys: dict[fx.Node, str] = {}
    rows: list[str] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            keys[node] = f"in{len(keys)}"
            rows.append(f"{keys[node]} {_layouts(node)}")
            continue
        arguments = str(map_arg((node.args, node.kwargs), lambda n: _Key(keys[n])))
        if getattr(node.target, "__name__", "") == "getitem":
            keys[node] = f"take{arguments}"
            continue
        keys[node] = f"n{len(rows)}"
        rows.append(f"{node.op} {_target_words(node)} {arguments} {_layouts(node)}")
    return rows


def _kernel_row(members: Calls) -> str:
    return " ".join(_target_words(call) for call in members if call is not None)


def _target_words(node: fx.Node) -> str:
    if node.op == "output":
        return ""
    return str(node.target) if isinstance(node.target, str | OpOverload) else str(node.target.__name__)


class _Key(str):
    """A string that is written without quotes inside a tuple."""

    __slots__ = ()
    __repr__ = str.__str__


def _layouts(node: fx.Node) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return str([f"{describe(leaf)}{leaf.stride()}" for leaf in leaves])
