"""Says once that a step took more than its plan's budget."""

from __future__ import annotations

import logging

from cost_models.units import format_bytes
from orchestrator.metrics import StepRecord

logger = logging.getLogger(__name__)


class PeakWatch:
    """Compares measured peaks with a budget.

    Args:
        promise: predicted peak and budget of a rank, in bytes; None for plain training.
    """

    def __init__(self, promise: tuple[int, int] | None) -> None:
        self._promise, self._warned = promise, False

    def look_at(self, record: StepRecord) -> None:
        """Warn where this step is the first above the budget."""
        peak_bytes = record.measured_peak_bytes
        if self._promise is None or peak_bytes is None or self._warned:
            return
        budget_bytes = self._promise[1]
        excess = peak_bytes - budget_bytes
        if excess > 0:
            self._warned = True
            logger.warning(
                "step %d took %s, %s more than the budget; plan with a budget of %s",
                record.step,
                format_bytes(peak_bytes),
                format_bytes(excess),
                format_bytes(budget_bytes - excess),
            )
