"""Plan a job before its ranks start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.job import JobSpec
from orchestrator.progress import Display
from orchestrator.run_folder import RunFolder
from planner.strict import WorkloadError


@dataclass(frozen=True)
class JobPlan:
    """A plan, as the ranks get it and as people read it."""

    plan: Any
    json_text: str
    lines: list[str]


def plan_job(job: JobSpec, folder: RunFolder, display: Display) -> JobPlan | None:
    """The plan for one rank of a job, written to the run's folder; None for budget "none".

    A continued run uses the plan that it began with.
    """
    if job.budget == "none":
        return None
    raise WorkloadError("planning is not available yet; use --budget none")
