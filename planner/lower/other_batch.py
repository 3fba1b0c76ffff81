"""A batch of other sizes than the plan's: where the step is the same but smaller, the same schedule holds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from planner.graph import Graph
from planner.plan_file import Plan

_SHAPE = re.compile(r"^(?P<kind>.*: \S+) \[(?P<sizes>[\d, ]*)\](?P<rest>.*)$")


def only_sizes_differ(planned: Sequence[str], found: Sequence[str]) -> bool:
    """Whether inputs are those of a plan but for the sizes of their dimensions.

    Args:
        planned: words of the plan's inputs, as `planner.lower.signature.input_words` writes them.
        found: those of a batch.

    >>> only_sizes_differ(("[0]: float32 [8, 3]",), ("[0]: float32 [5, 3]",))
    True
    >>> only_sizes_differ(("[0]: float32 [8, 3]",), ("[0]: int64 [5, 3]",))
    False
    """
    if len(planned) != len(found):
        return False
    return all(_without_sizes(a) == _without_sizes(b) for a, b in zip(planned, found, strict=True))


def bytes_of(words: Sequence[str]) -> int:
    """Bytes of dense tensors with these dtypes and sizes.

    >>> bytes_of(("[0]: float32 [8, 3]", "[1]: int64 [8]"))
    160
    """
    total = 0
    for leaf in words:
        match = _SHAPE.match(leaf)
        if match is not None:
            dtype = getattr(torch, match["kind"].rpartition(" ")[2])
            total += (
                math.prod(int(size) for size in match["sizes"].split(",") if size.strip()) * dtype.itemsize
            )
    return total


def _without_sizes(words: str) -> tuple[str, ...]:
    match = _SHAPE.match(words)
    if match is None:
        return (words,)
    return (match["kind"], str(match["sizes"].count(",")), match["rest"])


def why_not_smaller(plan: Plan, graph: Graph) -> str:
    """Why the plan's schedule may not be run on the graph of another batch within its peak; "" if it may.

    It may where the graph has the same operations on the same values, none of which takes more bytes: then at
    every moment of the schedule no more is there than was predicted.

    Args:
        plan: with a table of its step.
        graph: of the module on the other batch, without a loss outside of it.
    """
    if plan.table is None:
        return "the plan's file holds no table of its operations"
    planned = plan.table.costed_graph().graph
    loss = range(plan.num_forward, plan.num_forward + plan.num_loss)
    nodes = [node for index, node in enumerate(planned.nodes) if index not in loss]
    if [node.op for node in nodes] != [node.op for node in graph.nodes]:
        return "the step has other operations"
    first, count = plan.num_forward_values, plan.num_loss_values
    for old, new in zip(nodes, graph.nodes, strict=True):
        kept = tuple(v if v < first else v - count for v in old.inputs if not first <= v < first + count)
        if kept != new.inputs or len(old.outputs) != len(new.outputs):
            return f"{new.name} reads other values"
        for a, b in zip(old.outputs, new.outputs, strict=True):
            if graph.values[b].size_bytes > planned.values[a].size_bytes:
                return f"{new.name} makes more bytes than planned"
    return ""
