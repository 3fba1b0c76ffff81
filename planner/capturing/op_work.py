"""An ATen operation with its shapes -> the work that it demands, for any cost model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from cost_models.work import DTYPES, Work, WorkKind

# The kind of an operation is found by the first fragment that its name contains.
_KIND_BY_FRAGMENT: tuple[tuple[str, WorkKind], ...] = (
    ("scaled_dot_product", "attention"),
    ("flash_attention", "attention"),
    ("convolution", "convolution"),
    ("cudnn_rnn", "matmul"),
    ("mkldnn_rnn", "matmul"),
    ("addmm", "matmul"),
    ("bmm", "matmul"),
    ("mm", "matmul"),
    ("addmv", "matmul"),
    ("linear", "matmul"),
    ("embedding", "gather"),
    ("gather", "gather"),
    ("scatter", "gather"),
    ("index", "gather"),
    ("take", "gather"),
    ("dropout", "random"),
    ("bernoulli", "random"),
    ("rand", "random"),
    ("normal", "random"),
    ("uniform", "random"),
    ("exponential", "random"),
    ("multinomial", "random"),
    ("norm", "reduction"),
    ("softmax", "reduction"),
    ("sum", "reduction"),
    ("mean", "reduction"),
    ("var", "reduction"),
    ("pool", "reduction"),
    ("nll_loss", "reduction"),
    ("amax", "reduction"),
    ("argmax", "reduction"),
    ("cumsum", "reduction"),
    ("sort", "reduction"),
    ("topk", "reduction"),
    ("clone", "copy"),
    ("_to_copy", "copy"),
    ("cat", "copy"),
    ("stack", "copy"),
    ("constant_pad", "copy"),
)

# A softmax, then three more kernels: which scores are -inf (a byte each), which rows have no others, zeros there.
_SAFE_SOFTMAX = "_safe_softmax"


def work_of(call: fx.Node) -> Work:
    """Demand of one call, from the shapes that the trace recorded.

    FLOP of matrix products, convolutions and attention come from torch's own formulas; attention that they do
    not know is counted from its shapes; everything else is one operation per element. Bytes are those of all
    tensors read and written once, and once more for each further kernel of an operator that is several of them.

    Args:
        call: a ``call_function`` node with fake tensors in its metadata.

    Returns:
        FLOP, bytes, dtype and kind.
    """
    name = str(getattr(call.target, "overloadpacket", call.target)).removeprefix("aten.")
    out = call.meta.get("val")
    args = map_arg(call.args, lambda n: n.meta.get("val"))
    kwargs = map_arg(call.kwargs, lambda n: n.meta.get("val"))
    inputs = _tensors([n.meta.get("val") for n in call.all_input_nodes])
    outputs = _tensors(out)
    kind = _kind_of(name)
    read_bytes = sum(_moved_bytes(t) for t in inputs)
    written_bytes = sum(_moved_bytes(t) for t in outputs)
    if kind == "gather" and "backward" not in name:
        read_bytes = min(read_bytes, 2 * written_bytes)
    if name == _SAFE_SOFTMAX:
        mask_bytes = sum(t.numel() for t in outputs)
        read_bytes += 2 * written_bytes + mask_bytes
        written_bytes += written_bytes + mask_bytes
    floating = [t for t in (*outputs, *inputs) if t.dtype.is_floating_point]
    dtype = (
        str((floating or outputs or inputs)[0].dtype).removeprefix("torch.")
        if outputs or inputs
        else "float32"
    )
    return Work(
        flop=_flop(call, kind, args, kwargs, out, outputs, inputs),
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        dtype=dtype if dtype in DTYPES else "float32",
        kind=kind,
        operation=operation_of(call),
    )


def operation_of(call: fx.Node) -> str:
    """Operator and arguments in one line: tensors by dtype, shape and, where they are not contiguous, strides.

    Two calls with the same line run the same kernel on the same device.
    """
    args = [_written(argument) for argument in call.args]
    args += [f"{name}={_written(argument)}" for name, argument in sorted(call.kwargs.items())]
    return " ".join([str(call.target), *args])


def in_place(operation: str) -> str:
    """The line of an operation that writes over an argument, of that of the operation with memory of its own."""
    return f"in-place {operation}" if operation else ""


def _written(argument: Any) -> str:
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_written(item) for item in argument)}]"
    if not isinstance(argument, fx.Node):
        return str(argument)
    val = argument.meta.get("val")
    if isinstance(val, list | tuple):
        return f"[{', '.join(_tensor_word(t) for t in val)}]"
    return _tensor_word(val)


def _tensor_word(val: Any) -> str:
    if not isinstance(val, torch.Tensor):
        return "?" if val is None or isinstance(val, torch.SymInt) else str(val)
    strides = "" if val.is_contiguous() else f"({','.join(map(str, val.stride()))})"
    return f"{str(val.dtype).removeprefix('torch.')}[{','.join(map(str, val.shape))}]{strides}"


def _kind_of(name: str) -> WorkKind:
    """Kind of the operation with this name."""
    for fragment, kind in _KIND_BY_FRAGMENT:
        if fragment in name:
            return kind
    return "elementwise"


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value or in nested sequences of values."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _moved_bytes(tensor: torch.Tensor) -> int:
    """Bytes that an operation touches: expanded dimensions are read once."""
    elements = math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 1
    )
    return elements * tensor.element_size()


def _flop(
    call: fx.Node,
    kind: WorkKind,
    args: Any,
    kwargs: Any,
    out: Any,
    outputs: list[torch.Tensor],
    inputs: list[torch.Tensor],
) -> float:
    formula: Callable[..., int] | None = flop_registry.get(getattr(call.target, "overloadpacket", None))
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=out))
    if kind == "attention" and len(inputs) >= 3:
        # Q K^T and P V forward; backward does each twice and Q K^T once more.
        tensors = [t for t in inputs if t.dim() == 4]
        backward = "backward" in str(call.target)
        query, key, value = tensors[1:4] if backward else tensors[:3]
        batch, heads, length, width = query.shape
        product = 2.0 * batch * heads * length * key.shape[2]
        return product * (3 * width + 2 * value.shape[3]) if backward else product * (width + value.shape[3])
    if kind in ("copy", "gather"):
        return 0.0
    return float(max((t.numel() for t in (*outputs, *inputs)), default=0))
