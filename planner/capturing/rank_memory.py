"""What one rank holds between its steps, and what sharing a model adds during them, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from planner.blocks import Unit, units
from planner.capturing.gathering import Transient, UnitBytes, transient
from planner.capturing.optimizer_step import Optimizers, optimizer_bytes
from planner.lower.trace import storage_bytes

Sharding = Literal["ddp", "fsdp", "fsdp_keep"]
# The count of what went into an average.
_COUNT_BYTES = 8


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        parameter_bytes: whole, or this rank's padded shares.
        buffer_bytes: of the model.
        gradient_bytes: whole (in buckets where ranks are several), or this rank's padded shares. DDP's two counters
            of 4 B for each parameter are in no tensor and not in it.
        optimizer_bytes: its state, slow copies of weights (LookAhead) in it.
        average_bytes: a running average of the weights.
        optimizer_temporary_bytes: the most that a step of the optimizer allocates besides.
        gathered_bytes: the most parameters that are gathered at once.
        communication_bytes: the most that sharing the model holds in a step beside what is resident before it:
            gathered parameters, messages, whole gradients, and the gradient shares themselves. 0 without FSDP2.
        late_bytes: the most messages beside those that gloo may not have freed yet. 0 with other backends.
    """

    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    optimizer_temporary_bytes: int
    gathered_bytes: int
    communication_bytes: int
    late_bytes: int

    @property
    def resident_bytes(self) -> int:
        """Between two steps, gradients there."""
        return self.parameter_bytes + self.buffer_bytes + self.gradient_bytes + self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Optimizer state and averages."""
        return self.optimizer_bytes + self.average_bytes


def rank_memory(
    model: nn.Module,
    *,
    optimizer: Optimizers | None,
    world_size: int,
    sharding: Sharding = "ddp",
    rank: int = 0,
    blocks: tuple[str, ...] = (),
    accumulation: int = 1,
    averaged: bool = False,
    staging: bool = False,
) -> RankMemory:
    """Bytes of one rank, from shapes alone; the optimizer's by fake steps of the real one on this rank's shares.

    FSDP2 shards each parameter in dim 0 over p ranks: a share has ceil(n / p) of n rows, of which the last ranks
    may have fewer, or none, in use. Parameters and gradients are stored padded, optimizer state is not:

        parameters, gradients   ceil(n / p) rows on every rank
        state, averages         min(ceil(n / p), max(0, n - rank ceil(n / p))) rows

    What a step adds is replayed as if modules ran in the order in which the model lists them.

    Args:
        model: real, fake or meta parameters, not sharded yet.
        optimizer: builds the optimizer of a module, or several do, one after the other; None has no state.
        world_size: p; 1 without sharing.
        sharding: "ddp" for a copy a rank; "fsdp" for FSDP2 that frees a block between forward and backward,
            "fsdp_keep" for one that does not.
        rank: whose memory; rank 0 has the most.
        blocks: names of the units beside the root, see `planner.blocks.block_names`.
        accumulation: micro-batches in one step; only the last is reduced.
        averaged: a running average of the weights is kept too (`torch.optim.swa_utils.AveragedModel`).
        staging: the backend copies what it is given, as gloo does.

    Raises:
        ValueError: FSDP2 on one rank, or no such rank.
        CaptureError: the optimizer's step cannot be tried.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if sharding != "ddp" and world_size == 1:
        raise ValueError(f"sharding {sharding!r} needs at least two ranks, got world_size=1")
    parameters = list(model.parameters())
    buffer_bytes = sum(storage_bytes(buffer) for buffer in dict.fromkeys(model.buffers()))
    if sharding == "ddp":
        own = padded = whole_shape
    else:

        def own(parameter: torch.Tensor) -> tuple[int, ...]:
            return share_shape(parameter, world_size=world_size, rank=rank)

        def padded(parameter: torch.Tensor) -> tuple[int, ...]:
            return share_shape(parameter, world_size=world_size, rank=0)

    state_bytes, temporary_bytes = (
        (0, 0) if optimizer is None else optimizer_bytes(model, optimizer, shape=own)
    )
    during = Transient(0, 0)
    if sharding != "ddp":
        during = _transient(
            model,
            blocks,
            world_size=world_size,
            reshard_after_forward=sharding == "fsdp",
            accumulating=accumulation > 1,
            staging=staging,
        )
    return RankMemory(
        parameter_bytes=_bytes(parameters, padded),
        buffer_bytes=buffer_bytes,
        gradient_bytes=_bytes((p for p in parameters if p.requires_grad), padded),
        optimizer_bytes=state_bytes,
        average_bytes=_bytes(parameters, own) + buffer_bytes + _COUNT_BYTES if averaged else 0,
        optimizer_temporary_bytes=temporary_bytes,
        gathered_bytes=during.gathered_bytes,
        communication_bytes=during.communication_bytes,
        late_bytes=during.late_bytes,
    )


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """All of a parameter."""
    return tuple(parameter.shape)


def share_shape(parameter: torch.Tensor, *, world_size: int, rank: int) -> tuple[int, ...]:
    """One rank's rows of a parameter under FSDP2; those of rank 0 are what every rank stores.

    Raises:
        ValueError: a scalar has no rows.
    """
    if not parameter.ndim:
        raise ValueError("a scalar parameter cannot be sharded; give it the shape [1], or use ddp")
    num_rows = parameter.shape[0]
    share = -(-num_rows // world_size)
    return min(share, max(0, num_rows - rank * share)), *parameter.shape[1:]


def _bytes(parameters: Iterable[torch.Tensor], shape: Callable[[torch.Tensor], tuple[int, ...]]) -> int:
    return sum(math.prod(shape(parameter)) * parameter.element_size() for parameter in parameters)


def _transient(
    model: nn.Module,
    blocks: tuple[str, ...],
    *,
    world_size: int,
    reshard_after_forward: bool,
    accumulating: bool,
    staging: bool,
) -> Transient:
    root, *parts = units(model, blocks)
    before, after = _around(model, blocks, root)
    return transient(
        _unit_bytes(root, before, after, world_size=world_size),
        [_unit_bytes(part, frozenset(), frozenset(), world_size=world_size) for part in parts],
        reshard_after_forward=reshard_after_forward,
        accumulating=accumulating,
        input_has_gradient=bool(before) or not parts,
        staging=staging,
    )


def _around(
    model: nn.Module, blocks: tuple[str, ...], root: Unit
) -> tuple[frozenset[nn.Parameter], frozenset[nn.Parameter]]:
    """Trainable parameters of the root that are used before the first block, and those used after it."""
    before: set[nn.Parameter] = set()
    after: set[nn.Parameter] = set()
    of_root, here = set(root.parameters), before
    for name, module in model.named_modules(remove_duplicate=False):
        if blocks and name == blocks[0]:
            here = after
        here.update(p for p in module.parameters(recurse=False) if p.requires_grad and p in of_root)
    return frozenset(before), frozenset(after)


def _unit_bytes(
    unit: Unit, before: frozenset[nn.Parameter], after: frozenset[nn.Parameter], *, world_size: int
) -> UnitBytes:
    def share(parameter: torch.Tensor) -> tuple[int, ...]:
        return share_shape(parameter, world_size=world_size, rank=0)

    trainable = [parameter for parameter in unit.parameters if parameter.requires_grad]
    share_bytes = _bytes(trainable, share)
    return UnitBytes(
        gathered=world_size * _bytes(unit.parameters, share),
        early=_bytes((p for p in trainable if p in after), whole_shape),
        tied=_bytes((p for p in trainable if p in after and p in before), whole_shape),
        late=_bytes((p for p in trainable if p not in after), whole_shape),
        largest=max((_bytes([p], whole_shape) for p in trainable), default=0),
        reduced=world_size * share_bytes,
        share=share_bytes,
    )
