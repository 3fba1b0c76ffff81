"""What changes from step to step beside tensors."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        samples_seen: training samples of these steps.
        validation_before: mean validation loss before the first step.
        validation_after: mean validation loss when it was last measured.
        validated_step: and when that was.
        skipped: (position, number) of the samples in the stream that are left out, in their order.
    """

    step: int = 0
    samples_seen: int = 0
    validation_before: float | None = None
    validation_after: float | None = None
    validated_step: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)

    @property
    def position(self) -> int:
        """In the stream of training samples, of the first that comes next.

        >>> Progress(samples_seen=8, skipped=[(4, 2), (10, 2), (20, 2)]).position
        12
        """
        position = self.samples_seen
        for start, count in self.skipped:
            if position >= start:
                position += count
        return position
