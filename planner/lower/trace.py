"""Where AOTAutograd is touched: export a joint graph, and state as plain facts what only torch's internals know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._C import DispatchKey
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    IntermediateBaseAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import JointWithDescriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.fx import traceback
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from planner.capturing.reading import FlatOutput, OutputRole, Traced
from planner.errors import CaptureError
from planner.lower.fakes import KnownConstants
from planner.lower.random_replay import AS_EAGER_DRAWS, STATE, draw_like_sources, draws, save_states
from planner.lower.recurrent import recurrent_layers
from planner.lower.tangents import Layouts, laid_out
from planner.step import StepModule

# Operators with Python decompositions that are not what eager runs.
_TAKEN_APART = re.compile(
    r"dropout|lstm|gru|rnn_tanh|rnn_relu|_?upsample_\w+|softshrink|hardshrink|matmul|multi\w+_loss\w*"
)
_FORWARD_LAYER, _BACKWARD_LAYER = "nn_module_stack", "fwd_nn_module_stack"
# In a step module the layers of the model have the names that they have in the model.
_LAYER_OF_STEP = {"": "loss", "model": ""}

TORCH_VERSION = torch.__version__.split("+")[0]
# Before 2.13 autograd keeps the gradients that it hands to a compiled backward until that backward returns.
TANGENTS_STAY = tuple(int(part) for part in TORCH_VERSION.split(".")[:2]) < (2, 13)


def export_joint(
    stack: ExitStack,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    root: str = "",
    gradients: Layouts = (),
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> JointWithDescriptors:
    """The joint forward and backward graph of a call of a module.

    Args:
        stack: must stay open for as long as the joint graph is compiled.
        module: with fake parameters.
        args: fake positional inputs.
        kwargs: fake named inputs.
        root: layer of the calls that lie in no module below this one.
        gradients: layouts of the gradients of its outputs; () for the outputs' own.
        decompositions: operator -> its parts, for those that are to be taken apart.

    Returns:
        The graph, the order of its inputs, and what is needed to compile it.
    """
    with (
        KnownConstants(),
        eager_kernels(),
        recurrent_layers(),
        each_tensor_once(module),
        laid_out(gradients),
        naming_layers(module, root=root),
    ):
        joint = aot_export_joint_with_descriptors(
            stack, module, args, kwargs, decompositions={**decompositions, **AS_EAGER_DRAWS}
        )
    draw_like_sources(joint.graph_module)
    save_states(joint.graph_module)
    return joint


@contextmanager
def eager_kernels() -> Iterator[None]:
    """Tracing takes operators apart as eager does.

    While torch traces it replaces some composite operators by Python decompositions that compute the same up to
    rounding (dropout, interpolation, recurrent layers). They are put aside here; those that make an operator
    without hidden writes of one that has them, such as batch norm's, stay.
    """
    hidden: list[tuple[Any, Any, Any]] = []
    for name in dir(torch.ops.aten):
        if not _TAKEN_APART.fullmatch(name):
            continue
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            operator = getattr(packet, overload)
            for key in (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd):
                if key in operator.py_kernels:
                    hidden.append((operator, key, operator.py_kernels.pop(key)))
                    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, key, kernel in hidden:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


@contextmanager
def each_tensor_once(module: nn.Module) -> Iterator[None]:
    """A tied parameter or buffer is one input of the graph traced inside, under the first of its names.

    AOTAutograd makes an input of every name; the gradients of a tied weight would be added when backward has
    returned, in the order of the names. Inside the graph autograd adds them in the order that eager has.
    """
    twins = [*_twins(module, "_parameters"), *_twins(module, "_buffers")]
    if not twins:
        yield
        return
    outer: list[list[Any]] = []

    def tie(module: nn.Module, args: Any) -> None:
        outer.append([tensors[name] for tensors, name, _, _ in twins])
        for tensors, name, first_tensors, first_name in twins:
            tensors[name] = first_tensors[first_name]

    def untie(module: nn.Module, args: Any, outputs: Any) -> None:
        for (tensors, name, _, _), tensor in zip(twins, outer.pop(), strict=True):
            tensors[name] = tensor

    # AOTAutograd asks the module for every name (``remove_duplicate=False``).
    named_parameters, named_buffers = module.named_parameters, module.named_buffers
    module.named_parameters = lambda *_, **__: named_parameters()  # type: ignore[method-assign]
    module.named_buffers = lambda *_, **__: named_buffers()  # type: ignore[method-assign]
    hooks = (
        module.register_forward_pre_hook(tie, prepend=True),
        module.register_forward_hook(untie, always_call=True),
    )
    try:
        yield
    finally:
        del module.named_parameters, module.named_buffers
        for hook in hooks:
            hook.remove()


def _twins(module: nn.Module, registry: str) -> Iterator[tuple[dict[str, Any], str, dict[str, Any], str]]:
    """(tensors of a module, name, those of the module that has the same tensor first, its name there)."""
    first: dict[int, tuple[dict[str, Any], str]] = {}
    for part in module.modules():
        tensors = getattr(part, registry)
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if id(tensor) in first:
                yield tensors, name, *first[id(tensor)]
            else:
                first[id(tensor)] = tensors, name


@contextmanager
def naming_layers(module: nn.Module, *, root: str) -> Iterator[None]:
    """Calls traced inside carry the name of the module that made them; AOTAutograd hands it on to backward.

    Args:
        module: that is called.
        root: name of what lies in no module below it.
    """
    outer: list[Any] = []  # torch replaces the dict `current_meta` now and then: it is read anew each time

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            outer.append(traceback.current_meta.get(_FORWARD_LAYER))
            traceback.current_meta[_FORWARD_LAYER] = {name: (name, type(module))}

        return hook

    def leave(module: nn.Module, args: Any, outputs: Any) -> None:
        before = outer.pop()
        if before is None:
            traceback.current_meta.pop(_FORWARD_LAYER, None)
        else:
            traceback.current_meta[_FORWARD_LAYER] = before

    hooks = []
    with_loss = isinstance(module, StepModule)
    for name, part in module.named_modules():
        if not isinstance(part, torch.jit.ScriptModule):
            layer = _LAYER_OF_STEP.get(name, name.removeprefix("model.")) if with_loss else name or root
            hooks.append(part.register_forward_pre_hook(enter(layer)))
            hooks.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    # The gradient of outputs that lie in one tensor is that of the tensor, which counts on after the outputs.
    others = [d for f, d in zip(outputs, output.meta["desc"], strict=True) if f.role is OutputRole.OTHER]
    num_plain = sum(f.role is OutputRole.PLAIN for f in outputs)
    number_of = {desc: num_plain + number for number, desc in enumerate(others)}
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return Traced(
        module=module,
        outputs=tuple(outputs),
        tangents={
            node: desc.output.idx if isinstance(desc.output, PlainAOTOutput) else number_of[desc.output]
            for node, desc in ((node, node.meta["desc"]) for node in placeholders)
            if isinstance(desc, TangentAOTInput)
            and isinstance(desc.output, PlainAOTOutput | IntermediateBaseAOTOutput)
        },
        storages={node: _storages(node.meta.get("val")) for node in module.graph.nodes},
        backward=frozenset(n for n in calls if n.meta.get("partitioner_tag") == "is_backward"),
        random=frozenset(n for n in calls if draws(n)),
        states={n: n.meta[STATE] for n in calls if STATE in n.meta},
        opaque=frozenset(n for n in calls if _is_opaque(n.target)),
        layers={n: _layer(n) for n in calls},
    )


def tangents_of(module: fx.GraphModule) -> list[fx.Node]:
    """The placeholders of gradients that come from outside, in order."""
    nodes = module.graph.nodes
    return [n for n in nodes if n.op == "placeholder" and isinstance(n.meta["desc"], TangentAOTInput)]


def profiler_is_on() -> bool:
    """Whether a profiler runs in this process: another one would end it, so nothing can be measured inside."""
    return torch._C._autograd._profiler_enabled()  # pyright: ignore[reportAttributeAccessIssue]


def _layer(call: fx.Node) -> str:
    """Name of the module that a call comes from; of a call in backward, that of the forward call."""
    names = call.meta.get(_FORWARD_LAYER) or call.meta.get(_BACKWARD_LAYER) or {"": None}
    return next(reversed(names))


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
