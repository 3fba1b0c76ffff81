"""The learning rate that a job gives, or leaves to its optimizer."""

from __future__ import annotations

import inspect
import math

from orchestrator.job import JobSpec
from orchestrator.optim import optimizer_class
from planner.inputs.strict import WorkloadError


def own_rate(job: JobSpec) -> float:
    """The job's learning rate, its optimizer's default where it gives none.

    Raises:
        WorkloadError: the optimizer has none.
    """
    parameter = inspect.signature(optimizer_class(job.optimizer.name)).parameters.get("lr")
    rate = job.optimizer.hyper.get("lr", None if parameter is None else parameter.default)
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise WorkloadError(f"optimizer {job.optimizer.name!r} has the rate {rate!r}; give it an lr above 0")
    return float(rate)
