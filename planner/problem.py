"""What is asked of a solver: a costed graph, a budget in bytes, and the memory that is always there."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import Enum
from fractions import Fraction
from typing import Literal

from cost_models.units import format_bytes, parse_bytes
from planner.costed import CostedGraph

# What a plan has least of.
Objective = Literal["time", "energy"]
_MAX_BYTES = 2**63
_MAX_SHARE = 1_000_000


class BudgetKind(Enum):
    """How a budget is stated."""

    BYTES = "bytes"
    SHARE_OF_PEAK = "share_of_peak"
    SHARE_OF_ACTIVATIONS = "share_of_activations"
    NONE = "none"


@dataclass(frozen=True)
class Budget:
    """A budget as a user states it; `resolve_bytes` makes it a number.

    Attributes:
        kind: what `amount` means.
        amount: bytes, or a share (1.0 is all), or 0 for none.
    """

    kind: BudgetKind
    amount: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "4GiB", "60%" (of the retained-all peak), "50% of activations", or "none".

        >>> Budget.parse("60%")
        Budget(kind=<BudgetKind.SHARE_OF_PEAK: 'share_of_peak'>, amount=Fraction(3, 5))

        Raises:
            ValueError: anything else; the sentence says what was got and what to write.
        """
        text = str(text).strip()
        if text.lower() == "none":
            return cls(BudgetKind.NONE, Fraction(0))
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%(\s*of\s+activations)?", text)
        if match:
            share = Fraction(match[1]) / 100
            if not 0 < share < _MAX_SHARE:
                raise ValueError(
                    f"a budget must be more than 0 % and less than {100 * _MAX_SHARE} %, got {text[:40]!r}"
                )
            kind = BudgetKind.SHARE_OF_ACTIVATIONS if match[2] else BudgetKind.SHARE_OF_PEAK
            return cls(kind, share)
        if "%" in text:
            raise ValueError(f"a share must read like '60%' or '50% of activations', got {text!r}")
        amount = parse_bytes(text)
        if not 0 < amount < _MAX_BYTES:
            raise ValueError(f"a budget must be more than 0 bytes and less than 8 EiB, got {text[:40]!r}")
        return cls(BudgetKind.BYTES, Fraction(amount))

    def resolve_bytes(self, *, retained_all_peak_bytes: int, resident_bytes: int) -> int:
        """The budget of one rank in bytes.

        Args:
            retained_all_peak_bytes: peak of the rank with everything retained.
            resident_bytes: what is there before the step begins; the rest of the peak is activations.

        Returns:
            Bytes; for `NONE` the retained-all peak itself.
        """
        match self.kind:
            case BudgetKind.BYTES:
                return int(self.amount)
            case BudgetKind.SHARE_OF_PEAK:
                return int(self.amount * retained_all_peak_bytes)
            case BudgetKind.SHARE_OF_ACTIVATIONS:
                return resident_bytes + int(self.amount * (retained_all_peak_bytes - resident_bytes))
            case BudgetKind.NONE:
                return retained_all_peak_bytes


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of one rank that no schedule can change.

    Attributes:
        parameter_bytes: weights and buffers.
        gradient_bytes: gradients that exist before backward (accumulation); 0 where backward makes them.
        optimizer_bytes: state of the optimizer.
        bucket_bytes: buckets of data-parallel gradients.
        batch_bytes: inputs and targets of one micro-batch.
        unexplained_bytes: that a measured step took beyond what was predicted for it.
        optimizer_step_peak_bytes: most bytes of the rank during the optimizer's step, all of the above included.
    """

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    bucket_bytes: int = 0
    batch_bytes: int = 0
    unexplained_bytes: int = 0
    optimizer_step_peak_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name} must be >= 0, got {getattr(self, field.name)}")

    @property
    def resident_bytes(self) -> int:
        """There from the first to the last operation of the step."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.bucket_bytes
            + self.batch_bytes
            + self.unexplained_bytes
        )


@dataclass(frozen=True)
class Problem:
    """Retain or rematerialize: least time with no more than `budget_bytes` at any time.

    Attributes:
        costed: graph with seconds.
        budget_bytes: of one rank, static memory included.
        static: what is there anyway.
    """

    costed: CostedGraph
    budget_bytes: int
    static: StaticMemory = StaticMemory()

    def __post_init__(self) -> None:
        if self.budget_bytes < 0:
            raise ValueError(f"a budget must be >= 0 bytes, got {format_bytes(self.budget_bytes)}")
