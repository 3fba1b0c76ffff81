"""A job planned, as plain data: what can be sent back from another machine, the refusal included."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.block_planning import is_planned_blockwise, plan_job_blocks
from orchestrator.job import JobSpec
from orchestrator.planning import plan_job
from planner import Plan
from planner.blockwise.plans import BlockwisePlan
from planner.errors import CaptureError, InfeasibleError
from planner.inputs.strict import WorkloadError

_REFUSALS = {error.__name__: error for error in (WorkloadError, CaptureError)}


@dataclass(frozen=True)
class PlanAnswer:
    """What came of planning a job.

    Attributes:
        machine: where it was planned.
        plan: as JSON; None where there is none.
        refusal: class and message of what was raised instead; None where there is a plan.
        numbers: of a refusal for lack of memory: budget, smallest budget known, and whose time it peaks at.
    """

    machine: str
    plan: str | None
    refusal: tuple[str, str] | None = None
    numbers: tuple[int, int, str] | None = None

    def read(self, job: JobSpec) -> Plan | BlockwisePlan:
        """The plan, or what planning raised.

        Raises:
            planner.InfeasibleError, planner.CaptureError, WorkloadError: as planning here would.
        """
        if self.plan is not None:
            return (BlockwisePlan.model_validate_json if is_planned_blockwise(job) else Plan.from_json)(
                self.plan
            )
        assert self.refusal is not None
        name, message = self.refusal
        if self.numbers is not None:
            budget_bytes, smallest_bytes, owner = self.numbers
            raise InfeasibleError(
                message, budget_bytes=budget_bytes, smallest_feasible_bytes=smallest_bytes, owner=owner
            )
        raise _REFUSALS[name](message)


def planned(data: Mapping[str, Any], folder: str) -> PlanAnswer:
    """Plan a job where this is called.

    Args:
        data: the job as `JobSpec.to_data` writes it.
        folder: what its file targets are relative to.
    """
    machine = platform.node()
    try:
        job = JobSpec.from_data(data, folder=Path(folder), source="job")
        if is_planned_blockwise(job):
            return PlanAnswer(machine, plan_job_blocks(job).model_dump_json())
        return PlanAnswer(machine, plan_job(job).to_json())
    except InfeasibleError as error:
        numbers = error.budget_bytes, error.smallest_feasible_bytes, error.owner
        return PlanAnswer(machine, None, ("InfeasibleError", str(error)), numbers)
    except (WorkloadError, CaptureError) as error:
        return PlanAnswer(machine, None, (type(error).__name__, str(error)))
