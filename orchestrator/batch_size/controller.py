"""When the batch of a run grows or shrinks with the gradient noise, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.batch_size.noise_estimate import NoiseScale
from orchestrator.batch_size.rate_rule import RateRule, rate_factor_of, rate_rule
from orchestrator.job import JobSpec
from planner.inputs.strict import WorkloadError

# Half a doubling more than the batch, and 2.8 times less than that once it has doubled. Intervals that are relied
# on span a factor of 3 at most, so chance alone hardly takes the estimate from one to the other.
_GROW_AT = math.sqrt(2)
_SHRINK_AT = 0.25
# Changes of the other direction wait so many times longer, each time.
_REVERSAL_WAITS = 4
_RULES: Mapping[str, RateRule] = {"linear": "linear", "square_root": "square root", "none": "none"}


@dataclass(frozen=True)
class BatchChange:
    """One decision.

    Attributes:
        before: samples of a step.
        batch: of the steps from now on.
        reason: a sentence.
    """

    before: int
    batch: int
    reason: str


class BatchController:
    """Follows the noise scale with the batch: doubles it, or halves it, never more at once.

    The batch that is wanted is a share of B_simple. With B the batch of now,

        wanted >= sqrt(2) B, at least `patience` steps since the last change:  B becomes 2 B
        wanted <= B / 4, likewise:                                             B becomes B / 2

    within the smallest and largest batch: while the noise grows, B stays within a factor of sqrt(2) of what is
    wanted. To go back from a doubling, the estimate has to fall by a factor of 2.8, with `patience` new
    observations in it, and to rise as far to go forth again. Each reversal makes the patience four times as long,
    so a run of n steps has at most log_4 n of them. Where the estimate has no upper end, |G|^2 being lost in the
    noise, its lower end stands for it, and the batch may grow, not shrink: that the noise is at least so large is
    known well enough.

    Args:
        start: samples of a step at the beginning; a multiple of `unit`.
        smallest: of the batches.
        largest: of the batches.
        rate_batch: that the learning rate belongs to.
        unit: every batch is a multiple of it: micro-batch times ranks.
        rule: how the rate follows.
        share: of B_simple that is wanted, in (0, 1].
        patience: steps between two changes, >= 1.

    Reference: McCandlish et al., 2018, arXiv 1812.06162, section 2.4 (batch sizes that follow the noise); Smith et
        al., 2018, arXiv 1711.00489 (a growing batch in the place of a falling rate).
    """

    def __init__(
        self,
        *,
        start: int,
        smallest: int,
        largest: int,
        rate_batch: int,
        unit: int,
        rule: RateRule,
        share: float,
        patience: int = 20,
    ) -> None:
        assert smallest <= start <= largest, (smallest, start, largest)
        assert start % unit == 0, (start, unit)
        self.batch = start
        self._smallest, self._largest, self._unit = smallest, largest, unit
        self._rate_batch = rate_batch
        self._rule: RateRule = rule
        self._share, self._patience = share, patience
        self._changed_step, self._grew = 0, True

    @property
    def rate_factor(self) -> float:
        """Of the learning rate at the batch of now."""
        return rate_factor_of(self.batch / self._rate_batch, self._rule)

    def decide(self, noise: NoiseScale, *, step: int) -> BatchChange | None:
        """The change that an estimate calls for after so many steps; it is then in force.

        Args:
            noise: the estimate after the step; the same on every rank.
            step: steps done.
        """
        if step - self._changed_step < self._patience:
            return None
        low, high = noise.interval
        is_bound = not noise.reliable and math.isinf(high) and low > 0
        if not (noise.reliable or is_bound):
            return None
        known = low if is_bound else noise.value
        wanted, before = self._share * known, self.batch
        after = before
        if wanted >= _GROW_AT * before:
            after = self._whole(min(2 * before, self._largest))
        elif wanted <= _SHRINK_AT * before and not is_bound:
            after = self._whole(before // 2)
        if after == before or not self._smallest <= after <= self._largest:
            return None
        grows = after > before
        if grows != self._grew:
            self._patience *= _REVERSAL_WAITS
        self.batch, self._changed_step, self._grew = after, step, grows
        measured = (
            f"at least {low:.4g}" if is_bound else f"{noise.value:.4g} (between {low:.4g} and {high:.4g})"
        )
        return BatchChange(
            before,
            after,
            f"the noise scale is {measured}, {self._share:g} of it is {wanted:.4g}, and the batch was {before}",
        )

    def _whole(self, batch: int) -> int:
        return batch // self._unit * self._unit

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that mean the same for any number of ranks."""
        return {
            "batch": self.batch,
            "changed_step": self._changed_step,
            "grew": self._grew,
            "patience": self._patience,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: its batch is no multiple of the unit.
        """
        batch = state_dict["batch"]
        if batch % self._unit:
            raise ValueError(
                f"the run had come to a batch of {batch}, which is no multiple of {self._unit}, micro-batch times "
                "workers; choose another number of workers"
            )
        self.batch, self._changed_step = batch, state_dict["changed_step"]
        self._grew, self._patience = state_dict["grew"], state_dict["patience"]


def controller_of(job: JobSpec, *, num_samples: int) -> BatchController | None:
    """What changes the batch of a job while it runs; None where it stays.

    Args:
        job: with a range of batch sizes, or without.
        num_samples: of the training set, which no batch exceeds.

    Raises:
        WorkloadError: the smallest batch is larger than the training set.
    """
    sizes = job.batch_range
    if sizes is None:
        return None
    unit = job.batch_unit
    if sizes.first > num_samples:
        raise WorkloadError(
            f"train.batch_size: the first batch has {sizes.first} samples, but the training set {num_samples}; "
            "lower it"
        )
    return BatchController(
        start=sizes.first,
        smallest=sizes.min,
        largest=min(sizes.max, num_samples // unit * unit),
        rate_batch=job.base_batch,
        unit=unit,
        rule=_RULES[sizes.rule] if sizes.rule else rate_rule(job.optimizer.name),
        share=sizes.share,
    )
