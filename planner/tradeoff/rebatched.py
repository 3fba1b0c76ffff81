"""A workload with another batch size, and a step scaled from two captures of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from cost_models.roofline import CostModel
from cost_models.work import Work
from planner.costed import priced
from planner.graph import Graph
from planner.inputs.strict import WorkloadError
from planner.inputs.targets import TargetSpec
from planner.inputs.workload import BatchSpec, TensorSpec, Workload
from planner.problem import Problem, StaticMemory

_BATCH_KEYS = ("batch", "batch_size")


def batch_size_of(workload: Workload) -> int:
    """Samples of one micro-batch: dim 0 of the first input.

    Raises:
        WorkloadError: the batch is a callable without a keyword argument for it, or has no dim 0.
    """
    if isinstance(workload.batch, BatchSpec):
        shape = _first(workload.batch.inputs).shape
        if not shape or shape[0] < 1:
            raise WorkloadError(f"batch.inputs: dim 0 must count the samples, got shape {list(shape)}")
        return shape[0]
    size = workload.batch.kwargs.get(_batch_key(workload.batch))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise WorkloadError(f"the batch's keyword argument must be a whole number above 0, got {size!r}")
    return size


def with_batch_size(workload: Workload, size: int) -> Workload:
    """The workload with another number of samples.

    Dim 0 changes in every tensor of the batch where it is the same as in the first input; a batch that is a
    callable gets another keyword argument ``batch`` or ``batch_size``.

    Raises:
        WorkloadError: as for `batch_size_of`.
    """
    now = batch_size_of(workload)
    batch = workload.batch
    if isinstance(batch, BatchSpec):
        changed: BatchSpec | TargetSpec = batch.model_copy(
            update={
                "inputs": _resized(batch.inputs, now, size),
                "targets": _resized(batch.targets, now, size),
            }
        )
    else:
        changed = batch.model_copy(update={"kwargs": {**batch.kwargs, _batch_key(batch): size}})
    return workload.model_copy(update={"batch": changed})


def scaling(
    first: Problem, second: Problem, *, sizes: tuple[int, int], cost_model: CostModel
) -> Callable[[int], Problem] | None:
    """The problem at any batch size, if bytes and work are affine in it between two captures.

        size(b) = size(b1) + (size(b2) - size(b1)) (b - b1) / (b2 - b1)

    Args:
        first: captured with `sizes[0]` samples.
        second: captured with `sizes[1]` samples.
        sizes: of the two batches.
        cost_model: prices the scaled work.

    Returns:
        Samples -> problem with a budget of 0; None where the two graphs differ in structure. Whether the bytes are
        right is for a third capture to say.
    """
    one, two = first.costed.graph, second.costed.graph
    if _structure(one) != _structure(two):
        return None
    low, high = sizes

    def at(a: float, b: float, size: int) -> float:
        return a + (b - a) * (size - low) / (high - low)

    def whole(a: int, b: int, size: int) -> int:
        return max(0, a + (b - a) * (size - low) // (high - low))

    def work_at(a: Work, b: Work, size: int) -> Work:
        return replace(
            a,
            flop=max(0.0, at(a.flop, b.flop, size)),
            read_bytes=whole(a.read_bytes, b.read_bytes, size),
            written_bytes=whole(a.written_bytes, b.written_bytes, size),
            operation="",  # of other shapes, so of another time
        )

    def problem_at(size: int) -> Problem:
        nodes = tuple(
            replace(
                a,
                work=work_at(a.work, b.work, size),
                then=tuple(work_at(c, d, size) for c, d in zip(a.then, b.then, strict=True)),
                workspace_bytes=whole(a.workspace_bytes, b.workspace_bytes, size),
            )
            for a, b in zip(one.nodes, two.nodes, strict=True)
        )
        values = tuple(
            replace(a, size_bytes=whole(a.size_bytes, b.size_bytes, size))
            for a, b in zip(one.values, two.values, strict=True)
        )
        static = {
            field.name: whole(getattr(first.static, field.name), getattr(second.static, field.name), size)
            for field in fields(StaticMemory)
        }
        return Problem(priced(Graph(nodes, values), cost_model), 0, StaticMemory(**static))

    return problem_at


def _structure(graph: Graph) -> list[Any]:
    """What two captures must share to be one graph with other sizes."""
    nodes = [(n.name, n.op, n.phase, n.inputs, n.outputs, n.can_rematerialize) for n in graph.nodes]
    return [nodes, [(v.name, v.node, v.kind, v.first_run_only) for v in graph.values]]


def _batch_key(batch: TargetSpec) -> str:
    for key in _BATCH_KEYS:
        if key in batch.kwargs:
            return key
    raise WorkloadError(
        f"the batch is the callable {batch.target!r}, and none of its kwargs is called "
        f"{' or '.join(_BATCH_KEYS)}. Give the batch as shapes, or name its size in such a keyword argument."
    )


def _first(tensors: Any) -> TensorSpec:
    if isinstance(tensors, TensorSpec):
        return tensors
    several = list(tensors.values()) if isinstance(tensors, dict) else list(tensors)
    if not several:
        raise WorkloadError("batch.inputs is empty. Give at least one tensor.")
    return several[0]


def _resized(tensors: Any, now: int, size: int) -> Any:
    if tensors is None:
        return None
    if isinstance(tensors, TensorSpec):
        is_batched = bool(tensors.shape) and tensors.shape[0] == now
        return tensors.model_copy(update={"shape": (size, *tensors.shape[1:])}) if is_batched else tensors
    if isinstance(tensors, dict):
        return {name: _resized(one, now, size) for name, one in tensors.items()}
    return tuple(_resized(one, now, size) for one in tensors)
