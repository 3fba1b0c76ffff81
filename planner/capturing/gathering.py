"""What FSDP2 allocates in a step beside what stays: gathered units, whole gradients, and messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Each keeps a message that has arrived until it is given processor time again.
_NUM_GLOO_THREADS = 2


@dataclass(frozen=True)
class UnitBytes:
    """One unit of FSDP2 in bytes. A message is padded so that every rank sends a share of one size.

    Attributes:
        gathered: parameters of all ranks, padded: the message, and as much again for the parameters themselves.
        early: gradients, whole, of parameters that backward meets before the first block's backward. Blocks: 0.
        tied: of those, of parameters that are used before the first block too: whole gradients of their later use
            wait for those of the earlier one. Blocks: 0.
        late: gradients, whole, of the other trainable parameters.
        largest: of those the largest one.
        reduced: gradients, whole and padded: the message.
        share: gradients of one rank, padded.
    """

    gathered: int
    early: int
    tied: int
    late: int
    largest: int
    reduced: int
    share: int


@dataclass(frozen=True)
class Transient:
    """The most that a step holds beside parameter shards, optimizer state, batch and activations, in bytes.

    Attributes:
        gathered_bytes: parameters in use.
        communication_bytes: those, messages, whole gradients, and the shares that are reduced already.
        late_bytes: messages that each of gloo's threads may still hold when the step has no more use for them.
    """

    gathered_bytes: int
    communication_bytes: int
    late_bytes: int = 0


class _Meter:
    """Bytes by owner, and the most there has been."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], int] = {}
        self.peak = 0
        self.peak_gathered = 0

    def take(self, what: str, unit: int, size: int, *, staged: int = 0) -> None:
        """Allocate, and for a moment what the backend copies."""
        self.held[what, unit] = self.held.get((what, unit), 0) + size
        self.peak = max(self.peak, sum(self.held.values()) + staged)
        gathered = sum(size for (kind, _), size in self.held.items() if kind == "gathered")
        self.peak_gathered = max(self.peak_gathered, gathered)

    def drop(self, what: str, unit: int) -> None:
        self.held.pop((what, unit), None)

    def drop_all(self, what: str) -> None:
        self.held = {key: size for key, size in self.held.items() if key[0] != what}


def transient(
    root: UnitBytes,
    blocks: Sequence[UnitBytes],
    *,
    reshard_after_forward: bool,
    accumulating: bool,
    input_has_gradient: bool,
    staging: bool,
) -> Transient:
    """Replay what one training step allocates under FSDP2.

    Forward gathers a block when it begins; the message of the block before lives until then. Backward gathers the
    next block while one runs, then puts the whole gradients of the block into a message and keeps the rank's share;
    the message lives until that of the next block is made. The root is gathered from the first to the last.

    Args:
        root: parameters outside of the blocks.
        blocks: in the order in which they run.
        reshard_after_forward: False where blocks stay gathered until their backward.
        accumulating: the step is the last of several micro-batches, whose whole gradients are kept unreduced.
        input_has_gradient: of the first block; without one that block is reduced after the root.
        staging: the backend copies what it is given, as gloo does and NCCL does not.

    Returns:
        The peaks.

    Reference: Zhao et al., 2023, arXiv 2304.11277, sections 3.3 and 4; and what torch's FSDP2 is seen to do.
    """
    meter, copy = _Meter(), int(staging)
    units = (root, *blocks)
    if accumulating:
        for number, unit in enumerate(units):
            meter.take("gradient", number, unit.early + unit.late)
    _gather(meter, 0, root, copy)
    meter.take("gathered", 0, root.gathered)
    for number, block in enumerate(blocks, start=1):
        _gather(meter, number, block, copy)
        meter.drop("message", number - 1)
        meter.take("gathered", number, block.gathered)
        if reshard_after_forward:
            meter.drop("gathered", number)
    meter.drop_all("message")
    if reshard_after_forward and blocks:
        _gather(meter, len(blocks), blocks[-1], copy)
    _differentiate(meter, 0, root.early, root, accumulating)
    meter.take("waiting", 0, root.tied if accumulating else 0)
    late: list[int] = []
    for number in range(len(blocks), 0, -1):
        if reshard_after_forward:
            meter.take("gathered", number, units[number].gathered)
            meter.drop("message", number)
            if number > 1:
                _gather(meter, number - 1, units[number - 1], copy)
        _differentiate(meter, number, units[number].late, units[number], accumulating)
        if number == 1 and not input_has_gradient:
            late.append(number)
        else:
            _reduce(meter, number, units[number], copy)
    _differentiate(meter, 0, root.late, root, accumulating)
    meter.drop("waiting", 0)
    for number in (0, *late):
        _reduce(meter, number, units[number], copy)
    messages = sorted(max(unit.gathered, unit.reduced) for unit in units)
    return Transient(meter.peak_gathered, meter.peak, copy * sum(messages[-_NUM_GLOO_THREADS:]))


def _gather(meter: _Meter, number: int, unit: UnitBytes, copy: int) -> None:
    meter.take("message", number, unit.gathered, staged=copy * unit.gathered)


def _differentiate(meter: _Meter, number: int, size: int, unit: UnitBytes, accumulating: bool) -> None:
    """Gradients come one by one; where some are there, each is added to its own and freed."""
    if accumulating:
        meter.take("gradient", number, 0, staged=min(size, unit.largest))
    else:
        meter.take("gradient", number, size)


def _reduce(meter: _Meter, number: int, unit: UnitBytes, copy: int) -> None:
    if not unit.reduced:
        meter.drop("gathered", number)
        return
    meter.drop("gathered", number)
    meter.drop_all("reduced")
    meter.take("reduced", number, unit.reduced)
    meter.drop("gradient", number)
    meter.take("share", number, unit.share, staged=copy * unit.reduced)
