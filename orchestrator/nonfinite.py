"""What is done about a loss or weights that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from orchestrator.rank_errors import NotFiniteError

OnNan = Literal["stop", "rollback", "continue"]


@dataclass(frozen=True)
class Fault:
    """A step that was not finite.

    Attributes:
        step: which.
        ranks: that it was seen on.
        position: in the stream, of the step's first sample.
        batch: samples of the step.
    """

    step: int
    ranks: tuple[int, ...]
    position: int
    batch: int

    @property
    def samples(self) -> str:
        """Which they are, in words."""
        return f"samples {self.position} to {self.position + self.batch - 1} of the stream"

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"the loss or a weight of step {self.step} is not finite (rank {ranks})"


class NotFiniteGuard:
    """Says what follows what was not finite; every rank sees the same and decides alike.

    A rollback first takes the same samples again: a fault of the machine does not come twice. Where the same
    samples are not finite again they are left out.

    Args:
        action: the job's `on_nan`.
        most: how many rollbacks a run may have.
    """

    def __init__(self, action: OnNan, *, most: int) -> None:
        self.action, self.most, self.num_rollbacks = action, most, 0
        self._positions: set[int] = set()

    @property
    def acts(self) -> bool:
        """Whether anything but a warning follows."""
        return self.action != "continue"

    def answer(self, fault: Fault) -> bool:
        """Count one more rollback; whether the samples are left out after it.

        Raises:
            NotFiniteError: there is none left, or the job wants none.
        """
        if self.action != "rollback":
            raise NotFiniteError(
                f"{fault}. Lower the learning rate, look at {fault.samples}, or set train.on_nan to 'rollback'"
            )
        if self.num_rollbacks >= self.most:
            raise NotFiniteError(
                f"{fault} after {self.num_rollbacks} rollbacks, and train.max_failures allows {self.most}. Lower "
                f"the learning rate, or look at {fault.samples}"
            )
        self.num_rollbacks += 1
        is_again = fault.position in self._positions
        self._positions.add(fault.position)
        return is_again

    def sentence(self, fault: Fault, *, step: int, is_skipped: bool) -> str:
        """What was done: back to a step, and on with the same samples or without them."""
        how = f"without {fault.samples}" if is_skipped else "with the same samples"
        return f"{fault}: back to step {step} and on {how}, {self.num_rollbacks} of at most {self.most} times"


def bad_ranks(losses: Iterable[float], weights_finite: Iterable[float]) -> list[int]:
    """Ranks with a loss, or weights, that are not finite.

    >>> bad_ranks([1.0, float("nan"), 2.0], [1.0, 1.0, 0.0])
    [1, 2]
    """
    pairs = enumerate(zip(losses, weights_finite, strict=True))
    return [rank for rank, (loss, is_finite) in pairs if not (math.isfinite(loss) and is_finite)]


@torch.no_grad()
def all_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether no weight of this rank is NaN or infinite; takes no memory but a number a tensor."""
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in parameters]
    largest = [_largest(part).float() for part in parts if part.numel()]
    return not largest or bool(torch.isfinite(torch.stack(largest)).all())


def _largest(part: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, NaN where one is."""
    low, high = torch.aminmax(torch.view_as_real(part) if part.is_complex() else part)
    return torch.maximum(low.abs(), high.abs())
