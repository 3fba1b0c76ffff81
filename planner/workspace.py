"""Bytes that kernels allocate on the way, measured by running each distinct operation once on this device."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from planner.graph import Graph
from planner.measure import PeakMeter
from planner.reading import Calls

_log = logging.getLogger(__name__)

# Pointwise kernels and copies allocate their outputs and nothing else.
_WITHOUT_WORKSPACE = ("elementwise", "copy", "view")
# Kernels that are known to run on zeros. Others may read their inputs as something else than numbers (the packed
# state of a recurrent layer) and must not be tried.
_RUN_ON_ZEROS = re.compile(
    r"aten\.(convolution|_?scaled_dot_product|_?(native_)?\w*norm|_?(log_|safe_)*softmax|embedding|\w*pool|"
    r"(add|b|add?b)?mm|sum|mean|var|cumsum|sort|topk|nll_loss|upsample|index|scatter|gather|native_dropout|"
    r"bernoulli|rand|amax|argmax)\w*"
)


def with_workspaces(graph: Graph, calls: Calls) -> tuple[Graph, int]:
    """The graph with the workspace of every node, from one run of each distinct operation on zeros.

    One operation's inputs and outputs exist at a time; random generators are left as they were. The number of
    threads matters: some kernels allocate for each.

    Args:
        graph: a captured step.
        calls: for each node its FX call, with fake tensors in its metadata.

    Returns:
        The graph, and how many distinct operations could not be run alone (they count 0).
    """
    known: dict[str, int | None] = {}
    nodes = list(graph.nodes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for index, (node, call) in enumerate(zip(graph.nodes, calls, strict=True)):
            if call is None or node.work.kind in _WITHOUT_WORKSPACE:
                continue
            key = str((call.target, _layouts(call.args), _layouts(call.kwargs)))
            if key not in known:
                known[key] = _workspace_bytes(call) if _RUN_ON_ZEROS.match(str(call.target)) else None
            nodes[index] = dataclasses.replace(node, workspace_bytes=known[key] or 0)
    return Graph(tuple(nodes), graph.values), sum(size is None for size in known.values())


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


def _workspace_bytes(call: fx.Node) -> int | None:
    """Peak of one run above its inputs and outputs; None if the operation does not run on zeros."""
    args = map_arg(call.args, _zeros)
    kwargs = map_arg(call.kwargs, _zeros)
    outputs: list[Any] = []
    device = next((t.device for t in _tensors((args, kwargs))), torch.device("cpu"))
    meter = PeakMeter(device)
    try:
        with meter.step() as measured:
            outputs.append(call.target(*args, **kwargs))  # type: ignore[operator]
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        _log.debug("workspace of %s is not measured: %s", call.target, error)
        return None
    given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
    made = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in _tensors(outputs)
        if t.untyped_storage().data_ptr() not in given
    }
    return max(0, measured.peak_bytes - measured.live_bytes - sum(made.values()))


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
