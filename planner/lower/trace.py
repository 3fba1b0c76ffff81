"""Where AOTAutograd is touched: export a joint graph, and state as plain facts what only torch's internals know."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import JointWithDescriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from planner.errors import CaptureError
from planner.lower.fakes import KnownConstants
from planner.reading import FlatOutput, OutputRole, Traced

TORCH_VERSION = torch.__version__.split("+")[0]
# Before 2.13 autograd keeps the gradients that it hands to a compiled backward until that backward returns.
TANGENTS_STAY = tuple(int(part) for part in TORCH_VERSION.split(".")[:2]) < (2, 13)


def export_joint(
    stack: ExitStack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> JointWithDescriptors:
    """The joint forward and backward graph of a call of a module, without decompositions.

    Args:
        stack: must stay open for as long as the joint graph is compiled.
        module: with fake parameters.
        args: fake positional inputs.
        kwargs: fake named inputs.

    Returns:
        The graph, the order of its inputs, and what is needed to compile it.
    """
    with KnownConstants():
        return aot_export_joint_with_descriptors(stack, module, args, kwargs)


def traced_of(module: fx.GraphModule) -> Traced:
    """The joint graph with everything that only torch's internals know about it, as plain facts."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    by_role = {node.meta["desc"]: node for node in placeholders}
    output = next(node for node in module.graph.nodes if node.op == "output")
    outputs = []
    for result, desc in zip(output.args[0], output.meta["desc"], strict=True):
        node = result if isinstance(result, fx.Node) else None
        match desc:
            case None:  # the gradient of an input that has none
                outputs.append(FlatOutput(OutputRole.GRADIENT, node, None))
            case GradAOTOutput():
                outputs.append(FlatOutput(OutputRole.GRADIENT, node, _input_index(desc.grad_of)))
            case InputMutationAOTOutput():
                outputs.append(FlatOutput(OutputRole.MUTATION, node, None, by_role[desc.mutated_input]))
            case PlainAOTOutput():
                constant = None if node is not None else result
                outputs.append(FlatOutput(OutputRole.PLAIN, node, desc.idx, constant=constant))
            case _:
                outputs.append(FlatOutput(OutputRole.OTHER, node, None))
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return Traced(
        module=module,
        outputs=tuple(outputs),
        tangents={
            node: node.meta["desc"].output.idx
            for node in placeholders
            if isinstance(node.meta["desc"], TangentAOTInput)
            and isinstance(node.meta["desc"].output, PlainAOTOutput)
        },
        storages={node: _storages(node.meta.get("val")) for node in module.graph.nodes},
        backward=frozenset(n for n in calls if n.meta.get("partitioner_tag") == "is_backward"),
        random=frozenset(
            n for n in calls if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        ),
        opaque=frozenset(n for n in calls if _is_opaque(n.target)),
    )


def _input_index(desc: Any) -> int | None:
    return desc.idx if isinstance(desc, PlainAOTInput) else None


def _storages(val: Any) -> tuple[tuple[int, int], ...]:
    """(identity, bytes) of the storage of every tensor in a traced value."""
    tensors = [leaf for leaf in pytree.tree_leaves(val) if isinstance(leaf, torch.Tensor)]
    return tuple((storage_key(t), size) for t, size in zip(tensors, map(storage_bytes, tensors), strict=True))


def _is_opaque(target: Any) -> bool:
    """Whether running the operator twice may do more than giving the same values twice."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") != "_operator"
    return target._schema.is_mutable


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the storage below a tensor.

    Raises:
        CaptureError: a sparse tensor has none.
    """
    try:
        return tensor.untyped_storage().nbytes()
    except NotImplementedError as error:
        raise CaptureError(
            f"the step makes a {str(tensor.layout).removeprefix('torch.')} tensor, which cannot be planned. "
            "Use dense gradients (sparse=False)."
        ) from error


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage below a tensor, while it lives."""
    return tensor.untyped_storage()._cdata
