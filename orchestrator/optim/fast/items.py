"""Which tensors a fast implementation takes, as what this process holds of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.optim.fast.rules import AdamRule, Rule

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(slots=True)
class Item:
    """One tensor's step.

    Attributes:
        weight: strided and dense, of real numbers; of a sharded parameter this rank's shard.
        gradient: of the same shape and strides.
        first: the first moment, or LARS's buffer; None where there is none.
        second: the second moment; None for LARS.
        slow: LookAhead's slow weights; None without.
        row: elements over which the gradient is centralized; 0 for none.
        rule: what to do.
        groups: process groups over which squared norms add up.
    """

    weight: Tensor
    gradient: Tensor
    first: Tensor | None
    second: Tensor | None
    slow: Tensor | None
    row: int
    rule: Rule
    groups: tuple[dist.ProcessGroup, ...] = ()

    @property
    def reads_norms(self) -> bool:
        """Whether the step depends on norms over the whole tensor."""
        return self.rule.is_adapted


def has_no_data(weight: Tensor) -> bool:
    """True for tensors of shapes only, which a planner steps to see what a step allocates."""
    return weight.is_meta or (
        type(weight) not in _PLAIN and type(local_part(weight)).__name__ == "FakeTensor"
    )


def _has_own_operations(weight: Any) -> bool:
    """True for a subclass that carries out operations itself: there may be no memory behind it."""
    plain: Any = Tensor
    return type(weight).__torch_dispatch__ is not plain.__torch_dispatch__


def is_sharded(weight: Tensor) -> bool:
    """True for a DTensor; its class is not imported where there are none."""
    return type(weight) not in _PLAIN and type(weight).__name__ == "DTensor"


def local_part(weight: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its shard, as torch's operations on lists need it."""
    if not is_sharded(weight):
        return weight
    sharded: Any = weight
    return sharded.to_local()


def make_item(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], rule: Rule, *, centralized: bool
) -> Item | None:
    """The step of one tensor, or None if no fast implementation can make it.

    Args:
        weight: may be a DTensor, of which every rank steps its shard.
        gradient: of the same kind.
        state: with the tensors that the rule reads.
        rule: what to do.
        centralized: take from each row (dim 0) of the gradient its mean.

    Returns:
        None for numbers other than float32 and float64; for tensors with gaps, or of other shape, strides or device
        than their gradient or state; for partial sums; for centralized gradients that are not laid out row by row;
        for classes that carry out operations their own way.
    """
    groups: tuple[dist.ProcessGroup, ...] = ()
    if isinstance(rule, AdamRule):
        first, second, slow = state["exp_avg"], state["exp_avg_sq"], state.get("slow")
    else:
        first, second, slow = state.get("momentum_buffer"), None, None
    if type(weight) not in _PLAIN:
        if is_sharded(weight):
            found = _reduction_groups(weight, gradient, centralized=centralized)
            if found is None:
                return None
            groups = found
        elif not has_no_data(weight) and _has_own_operations(weight):
            return None
        weight, gradient = local_part(weight), local_part(gradient)
        first, second, slow = (None if t is None else local_part(t) for t in (first, second, slow))
    dtype = weight.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return None
    shape, device, strides = weight.shape, weight.device, weight.stride()
    is_by_rows = weight.is_contiguous()
    if not is_by_rows and (centralized or not _is_dense(weight)):
        return None
    for other in (gradient, first, second, slow):
        if other is None:
            continue
        is_alike = other.is_contiguous() if is_by_rows else other.stride() == strides
        # A state of another shape, or a pointer to nothing, would be read past its end.
        if not is_alike or other.dtype is not dtype or other.shape != shape or other.device != device:
            return None
    if gradient.is_neg():
        return None
    row = math.prod(weight.shape[1:]) if centralized and weight.ndim > 1 else 0
    return Item(weight, gradient, first, second, slow, row, rule, groups)


def _is_dense(weight: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of the dims."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(weight.stride(), weight.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _reduction_groups(
    weight: Any, gradient: Any, *, centralized: bool
) -> tuple[dist.ProcessGroup, ...] | None:
    """Process groups over which a DTensor's squares add up; None where its shards cannot be stepped alone."""
    if not is_sharded(gradient) or weight.placements != gradient.placements:
        return None
    groups = []
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            if centralized and placement.dim != 0:
                return None
            groups.append(weight.device_mesh.get_group(dim))
        elif not placement.is_replicate():
            return None
    return tuple(groups)


def reduce_squares(squares: Tensor, items: Sequence[Item]) -> None:
    """Add up the squares of sharded tensors over their ranks, in place: one all-reduce per set of ranks.

    Args:
        squares: (tensors, 2), on the tensors' device.
        items: of each row; the same on all ranks.
    """
    together: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for index, item in enumerate(items):
        if item.groups and item.reads_norms:
            together.setdefault(item.groups, []).append(index)
    for groups, indices in together.items():
        stacked = squares[indices]
        for group in groups:
            dist.all_reduce(stacked, group=group)
        squares[indices] = stacked


def numbers(rule: Rule) -> list[float]:
    """The coefficients of a rule in the order of its fields; a rate that is a tensor is read."""
    return [float(getattr(rule, field.name)) for field in dataclasses.fields(rule)]
