"""The executor inductor: each fused kernel of a half is compiled by torch's code generator, in the plan's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import _BoxedCodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planner.errors import CompilerError
from planner.lower.executor import Boxed, Executor, aten, marked_boxed
from planner.lower.partition import KERNEL
from planner.plan_file import Plan


def executor_of(plan: Plan) -> Executor:
    """The executor that a plan was made for."""
    return inductor if plan.provenance.executor == "inductor" else aten


def inductor(half: fx.GraphModule, example_inputs: Any) -> Boxed:
    """Kernel by kernel; what stands alone is called as eager mode calls it.

    Raises:
        CompilerError: there is no compiler for the device.
    """
    return marked_boxed(with_kernels(half).forward)


def with_kernels(half: fx.GraphModule) -> fx.GraphModule:
    """A half with one call in place of the calls of each kernel.

    Every kernel is compiled on its own, equal ones once: what is in memory between two kernels is what the plan
    says, whatever the code generator does inside of one.

    Args:
        half: forward or backward of `planner.lower.partition.partition`, with fake tensors in its metadata.

    Raises:
        CompilerError: there is no compiler for the device.
    """
    for node in half.graph.nodes:
        if KERNEL in node.meta:
            _check_compiler(_device_of(node))
            break
    compiled: dict[str, Callable[..., Any]] = {}
    graph = fx.Graph()
    new_of: dict[fx.Node, fx.Node] = {}
    run: list[fx.Node] = []
    for node in half.graph.nodes:
        kernel = node.meta.get(KERNEL)
        if run and node.op in ("call_function", "output") and kernel != run[0].meta[KERNEL]:
            _call_kernel(graph, run, new_of, compiled, half)
            run = []
        if kernel is not None:
            run.append(node)
        else:
            new_of[node] = graph.node_copy(node, lambda n: new_of[n])
    graph.set_codegen(_BoxedCodeGen())
    module = fx.GraphModule(half, graph)
    module.recompile()
    return module


def _device_of(call: fx.Node) -> str:
    return next(t.device.type for t in pytree.tree_leaves(call.meta["val"]) if isinstance(t, torch.Tensor))


def _check_compiler(device: str) -> None:
    """Raise CompilerError unless the code generator's compiler for a device is at hand."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device != "cpu":
        if not has_triton():
            raise CompilerError(
                f"the executor inductor has no Triton for {device}. Install triton, or plan with executor='aten'."
            )
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompilerError(
            "the executor inductor finds no C++ compiler. Install g++ or name one in the environment variable CXX, "
            "or plan with executor='aten'."
        ) from error


def _call_kernel(
    graph: fx.Graph,
    run: list[fx.Node],
    new_of: dict[fx.Node, fx.Node],
    compiled: dict[str, Callable[..., Any]],
    half: fx.GraphModule,
) -> None:
    """Write the call of one kernel and what takes its outputs apart."""
    inside = set(run)
    inputs = list(dict.fromkeys(i for node in run for i in node.all_input_nodes if i not in inside))
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    if not outputs:
        return
    kernel = _kernel_graph(run, inputs, outputs)
    key = _words(kernel)
    if key not in compiled:
        compiled[key] = _compiled(fx.GraphModule(half, kernel), [i.meta["val"] for i in inputs])
    name = run[0].meta[KERNEL][0]
    call = graph.create_node("call_function", compiled[key], tuple(new_of[i] for i in inputs), name=name)
    for position, output in enumerate(outputs):
        new_of[output] = graph.call_function(_item, (call, position))


def _kernel_graph(run: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    new_of: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(inputs):
        new_of[node] = graph.placeholder(f"in_{position}")
        new_of[node].meta["val"] = node.meta["val"]
    for position, node in enumerate(run):
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: new_of[n])
        new_of[node] = graph.create_node("call_function", node.target, args, kwargs, name=f"n_{position}")
        new_of[node].meta["val"] = node.meta["val"]
    graph.output(tuple(new_of[node] for node in outputs))
    graph.eliminate_dead_code()
    return graph


def _words(graph: fx.Graph) -> str:
    """Kernels with equal words are equal: operators, arguments and layouts."""
    rows = []
    for node in graph.nodes:
        tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
        layouts = [(t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), str(t.device)) for t in tensors]
        rows.append(f"{node.name} {node.target} {node.args} {node.kwargs} {layouts}")
    return "\n".join(rows)


def _compiled(kernel: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    # Outside of AOTAutograd's trace: it would take the outputs for those of the whole half.
    with tracing(None):
        # What is left whole in the joint graph, such as some views, in the operators that the generator knows.
        parts = make_fx(kernel, decomposition_table=select_decomp_table())(*inputs)
        output = next(node for node in parts.graph.nodes if node.op == "output")
        # The next kernel, or eager mode, reads the outputs with the strides of the trace.
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
        run: Any = compile_fx_inner(parts, inputs)

    def call(*arguments: Any) -> Any:
        return run(list(arguments))

    return call


def _item(outputs: Sequence[Any], position: int) -> Any:
    return outputs[position]
