"""What a job says of its batch size: between which ends it may move, and how the rate follows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from planner.inputs.strict import StrictModel

Size = Annotated[int, Field(strict=True, ge=1)]
# Growth of the largest batch over the smallest where a job does not say.
MOST_GROWTH = 64


class BatchRange(StrictModel):
    """Between which ends the samples of a step may move while a run goes on.

    Attributes:
        min: the smallest batch.
        max: the largest batch.
        start: the batch of the first steps; the smallest if absent.
        rate_batch: the batch that the learning rate and `train.steps` belong to; the smallest if absent.
        rule: how the rate follows the batch: "linear", "square_root" or "none"; absent, the optimizer's own, see
            `rate_rule`.
        share: of the noise scale that the batch follows. A batch B costs about B / B_noise more examples than the
            smallest ones, so a quarter costs up to a quarter.
    """

    min: Size
    max: Size
    start: Size | None = None
    rate_batch: Size | None = None
    rule: Literal["linear", "square_root", "none"] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.25

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.max < self.min:
            raise ValueError(
                f"min must not be above max, got min {self.min} and max {self.max}; exchange them"
            )
        if not self.min <= self.first <= self.max:
            raise ValueError(f"start must lie between min {self.min} and max {self.max}, got {self.start}")
        return self

    @property
    def first(self) -> int:
        """Samples of the first step."""
        return self.min if self.start is None else self.start


BatchSize = Annotated[
    Annotated[Literal["auto"] | Size, Tag("value")] | Annotated[BatchRange, Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, dict | BatchRange) else "value"),
]
"""Of a job: "auto", samples of a step, or a range."""


def read_batch_size(value: Any) -> Any:
    """A job's `batch_size` where it is of a kind that can be read; pydantic then reads it.

    Raises:
        ValueError: it is of no such kind.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or value == "auto" or is_count or isinstance(value, dict | BatchRange):
        return value
    raise ValueError(
        f"batch_size must be auto, a whole number of samples from 1, or {{min: .., max: ..}}, got {value!r}; write "
        "batch_size: auto"
    )
