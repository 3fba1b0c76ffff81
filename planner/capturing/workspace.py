"""What kernels really allocate, measured by running each distinct operation once on this device."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from planner.capturing.reading import Calls
from planner.graph import Graph
from planner.lower.recurrent import LSTM_LAYER, lstm_layer
from planner.measure import PeakMeter

_log = logging.getLogger(__name__)

# Copies allocate their outputs and nothing else.
_WITHOUT_WORKSPACE = ("copy", "view")
# Kernels that are known to run on zeros. Others may read their inputs as something else than numbers (the packed
# state of a recurrent layer) and must not be tried.
_RUN_ON_ZEROS = re.compile(
    r"aten\.(convolution|_?scaled_dot_product|_?(native_)?\w*norm|_?(log_|safe_)*softmax|embedding|\w*pool|"
    r"(add|b|add?b)?mm|sum|mean|var|cumsum|cumprod|prod|sort|topk|nll_loss|upsample|index|scatter|gather|"
    r"native_dropout|bernoulli|rand|amax|amin|argmax|argmin|\w*_loss|mkldnn_rnn_layer|_?linalg|_?cdist|_fft|"
    r"logsumexp|matrix_exp|triangular_solve|cholesky|grid_sampler|im2col|col2im|roll|flip|tri[lu]|masked_|"
    r"\w+_pad)\w*"
)


@dataclasses.dataclass(frozen=True)
class _Allocated:
    """What one run of an operation allocates.

    Attributes:
        workspace_bytes: at its worst moment above its inputs and outputs.
        output_bytes: of the storage of each tensor that it returns; some kernels return a small tensor in a large
            storage (the mean of a loss, in that of its terms).
        output_dtypes: of each thing that it returns, None for what is no tensor; a trace may hold another one
            (the statistics of a batch norm in 16 bits).
    """

    workspace_bytes: int
    output_bytes: tuple[int, ...]
    output_dtypes: tuple[torch.dtype | None, ...]


def with_workspaces(graph: Graph, calls: Sequence[Calls]) -> tuple[Graph, int]:
    """The graph with workspace and true output storages, from one run of each distinct operation on zeros.

    One operation's inputs and outputs exist at a time; random generators are left as they were. The number of
    threads matters: some kernels allocate for each.

    Args:
        graph: a captured step.
        calls: for each node its FX calls, with fake tensors in their metadata; those after the first are pointwise
            and run in place.

    Returns:
        The graph, and how many distinct operations could not be run alone (they count 0).
    """
    known: dict[str, _Allocated | None] = {}
    numbers: dict[str, int] = {}
    true_bytes: dict[fx.Node, int] = {}
    true_dtypes: dict[fx.Node, torch.dtype] = {}
    nodes, values = list(graph.nodes), list(graph.values)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for index, (node, (call, *_)) in enumerate(zip(graph.nodes, calls, strict=True)):
            is_loss = "_loss" in node.op
            if call is None or (node.work.kind in _WITHOUT_WORKSPACE and not is_loss):
                continue
            is_plain = node.work.kind == "elementwise" and not _RUN_ON_ZEROS.match(str(call.target))
            if is_plain and not is_loss and not _copies_arguments(call):
                nodes[index] = dataclasses.replace(node, workspace_bytes=_of_numbers(call, numbers))
                continue
            dtypes = [true_dtypes.get(argument) for argument in call.all_input_nodes]
            key = str((call.target, _layouts(call.args), _layouts(call.kwargs), dtypes))
            if key not in known:
                runs = _RUN_ON_ZEROS.match(str(call.target)) or _copies_arguments(call)
                known[key] = _allocated(call, true_bytes, true_dtypes) if runs else None
            found = known[key]
            if found is None:
                continue
            true_bytes |= _of_unknown_size(call, found)
            true_dtypes |= _of_other_dtype(call, found)
            total = node.workspace_bytes + found.workspace_bytes
            nodes[index] = dataclasses.replace(node, workspace_bytes=total)
            if len(found.output_bytes) == len(node.outputs):
                for v, size in zip(node.outputs, found.output_bytes, strict=True):
                    values[v] = dataclasses.replace(values[v], size_bytes=max(size, values[v].size_bytes))
        for index, (_, *then) in enumerate(calls):
            most = max((_of_numbers(call, numbers) for call in then if call is not None), default=0)
            if most > nodes[index].workspace_bytes:
                nodes[index] = dataclasses.replace(nodes[index], workspace_bytes=most)
    return Graph(tuple(nodes), tuple(values)), sum(found is None for found in known.values())


def _copies_arguments(call: fx.Node) -> bool:
    """Whether a pointwise kernel copies arguments: to the dtype that it computes in, or conjugated ones."""
    if torch.Tag.pointwise not in getattr(call.target, "tags", ()):
        return False
    vals = [node.meta.get("val") for node in call.all_input_nodes]
    tensors = [val for val in (*vals, call.meta.get("val")) if isinstance(val, torch.Tensor)]
    return any(t.is_complex() for t in tensors) or len({t.dtype for t in tensors} - {torch.bool}) > 1


def _of_numbers(call: fx.Node, known: dict[str, int]) -> int:
    """Bytes of the numbers that a pointwise kernel wraps as tensors (the 0.9 of a division): a few, of any size.

    Found by running it on tensors of one element.
    """
    plain = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, int | float)]
    if not plain or not str(call.target).startswith("aten."):
        return 0

    def smallest(node: fx.Node) -> Any:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return val
        return torch.zeros([1] * val.dim(), dtype=val.dtype, device=val.device)

    args, kwargs = map_arg((call.args, call.kwargs), smallest)
    key = str(
        (call.target, [(str(a.dtype), a.dim()) if isinstance(a, torch.Tensor) else type(a) for a in args])
    )
    if key not in known:
        found = _measured(call.target, args, kwargs)
        known[key] = 0 if found is None else found.workspace_bytes
    return known[key]


def _layouts(arguments: Any) -> Any:
    """The arguments with shape, strides, dtype and device in place of every node."""

    def words(node: fx.Node) -> str:
        val = node.meta.get("val")
        return (
            f"{val.dtype}{[*val.shape]}{val.stride()}{val.device}"
            if isinstance(val, torch.Tensor)
            else str(val)
        )

    return map_arg(arguments, words)


def _of_unknown_size(call: fx.Node, found: _Allocated) -> dict[fx.Node, int]:
    """What the trace takes for empty although the kernel fills it, an LSTM's state for backward: true bytes."""
    if call.target is not LSTM_LAYER or len(found.output_bytes) != 4:
        return {}
    return {user: found.output_bytes[3] for user in call.users if user.args[1] == 3}


def _of_other_dtype(call: fx.Node, found: _Allocated) -> dict[fx.Node, torch.dtype]:
    """Outputs that the kernel makes in another dtype than the trace holds."""
    other: dict[fx.Node, torch.dtype] = {}
    for user in call.users:
        val, position = user.meta.get("val"), user.args[1] if len(user.args) > 1 else None
        if isinstance(call.meta.get("val"), torch.Tensor) or not isinstance(position, int):
            continue
        real = found.output_dtypes[position] if position < len(found.output_dtypes) else None
        if isinstance(val, torch.Tensor) and real is not None and real != val.dtype:
            other[user] = real
    return other


def _allocated(
    call: fx.Node, true_bytes: Mapping[fx.Node, int], true_dtypes: Mapping[fx.Node, torch.dtype]
) -> _Allocated | None:
    """What one run allocates; None if the operation does not run on zeros."""

    def zeros(node: fx.Node) -> Any:
        if node in true_bytes:
            return torch.zeros(true_bytes[node], dtype=torch.uint8)
        made = _zeros(node)
        if "matrix_exp" in str(call.target) and isinstance(made, torch.Tensor):
            made.fill_(1.0)  # of zeros it takes the shortest way
        return made.to(true_dtypes[node]) if node in true_dtypes else made

    target = lstm_layer if call.target is LSTM_LAYER else call.target
    return _measured(target, map_arg(call.args, zeros), map_arg(call.kwargs, zeros))


def _measured(function: Any, args: Any, kwargs: Any) -> _Allocated | None:
    outputs: list[Any] = []
    device = next((t.device for t in _tensors((args, kwargs))), torch.device("cpu"))
    meter = PeakMeter(device)
    try:
        with meter.step() as measured:
            outputs.append(function(*args, **kwargs))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        _log.debug("workspace of %s is not measured: %s", function, error)
        return None
    given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
    made = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in _tensors(outputs)
        if t.untyped_storage().data_ptr() not in given
    }
    workspace = max(0, measured.peak_bytes - measured.live_bytes - sum(made.values()))
    given_back = outputs[0] if isinstance(outputs[0], list | tuple) else outputs
    dtypes = tuple(out.dtype if isinstance(out, torch.Tensor) else None for out in given_back)
    return _Allocated(workspace, tuple(made.values()), dtypes)


def _zeros(node: fx.Node) -> Any:
    """A real tensor of zeros with the layout of a fake one."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return val
    elements = 1 + sum((size - 1) * stride for size, stride in zip(val.shape, val.stride(), strict=True))
    flat = torch.zeros(max(elements, 0) if val.numel() else 0, dtype=val.dtype, device=val.device)
    return flat.as_strided(tuple(val.shape), val.stride())


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, list | tuple) else []
