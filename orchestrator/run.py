"""The ranks of one run, from their start to their end: planned for, sent off, planned for again."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.backends.protocol import Backend, RunFailedError
from orchestrator.backends.ray_planning import plan_on_cluster
from orchestrator.block_planning import is_planned_blockwise, plan_job_blocks
from orchestrator.checkpoint import CheckpointStore
from orchestrator.checkpoint_places import absolute, place_of
from orchestrator.failures import Cause, Decision, Failure, failure_event
from orchestrator.job import JobSpec
from orchestrator.metrics import Event, MetricsLog
from orchestrator.plan_check import digest_of_plans
from orchestrator.planning import plan_job
from orchestrator.progress import Display
from orchestrator.run_folder import RunFolder
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome
from planner import Plan
from planner.blockwise.plans import BlockwisePlan
from planner.errors import InfeasibleError

# Where a rank had too little memory, the next plan may use so much of the budget before.
_REPLAN_SHARE = 0.9


def plan_of(
    job: JobSpec,
    earlier: RunFolder | None,
    display: Display,
    *,
    address: str | None,
    is_beside: bool = False,
) -> tuple[Plan | BlockwisePlan | None, str | None]:
    """A new plan, or the one that a continued run began with; None for budget "none". And where it was made now.

    For a cluster it is made on one of its nodes, for this machine here; ranks never plan. Beside ranks that wait
    for it, which have the resources of workers, it takes none.
    """
    if job.budget == "none":
        return None, None
    if earlier is not None and earlier.was_planned_as(job):
        read = BlockwisePlan.load if is_planned_blockwise(job) else Plan.load
        return read(earlier.plan), None
    where = "" if address is None else " on the cluster"
    display.say(f"planning{where} for {job.hardware}, at most {job.solver.time_limit} of solving")
    if address is None:
        plan = plan_job_blocks(job) if is_planned_blockwise(job) else plan_job(job)
        return plan, platform.node()
    answer = plan_on_cluster(job, address=address, is_beside=is_beside)
    display.say(f"planned on {answer.machine}")
    return answer.read(job), answer.machine


@dataclass
class Run:
    """The ranks of one run, from their start to their end; what goes wrong is recorded too."""

    job: JobSpec
    folder: RunFolder
    backend: Backend
    on_event: Callable[[Event], None]
    log: MetricsLog
    stop: StopSignal
    display: Display
    record: Callable[..., None]
    plan: Plan | BlockwisePlan | None
    address: str | None

    def to_the_end(self, hint: str) -> Outcome:
        """Start the ranks and follow them.

        Args:
            hint: how to continue.
        """
        train = self.job.train
        if self.folder.was_left_running:
            self.on_event(_lost_driver(self.log))
        self.record(status="running")
        self.display.say(
            f"starting {train.workers} {'worker' if train.workers == 1 else 'workers'}, {train.backend}"
        )
        try:
            return self.backend(
                self._assignment(), self.job, on_event=self.on_event, stop=self.stop, replan=self
            )
        except RunFailedError as error:
            self.record(status="failed", error=str(error))
            place = place_of(train.checkpoint_dir, self.folder.path)
            if not error.bad_input and CheckpointStore(place, keep=1).paths():
                raise RunFailedError(f"{error}. Continue with: {hint}") from error
            raise
        except InfeasibleError as error:
            self.record(status="failed", error=str(error))
            raise
        except KeyboardInterrupt:
            self.record(status="interrupted")
            raise

    def _assignment(self) -> Assignment:
        job, plan = self.job, self.plan
        blocks = plan if isinstance(plan, BlockwisePlan) else None
        whole = plan.to_json() if isinstance(plan, Plan) else None
        block_plans = blocks.of_blocks() if blocks else {}
        return Assignment(
            job=job.with_changes({"checkpoint_dir": absolute(job.train.checkpoint_dir)}).to_data(),
            folder=str(job.model.folder),
            run_dir=str(self.folder.path),
            plan=whole,
            block_plans=block_plans,
            plan_digest=digest_of_plans(whole, block_plans),
            block_promise=(blocks.predicted_peak_bytes, blocks.budget_bytes) if blocks else None,
            must_continue=any(event["event"] == "checkpoint" for event in self.log.read()),
        )

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan, whose budget can be lowered."""
        return self.plan is not None

    def with_lower_budget(self) -> Assignment:
        """Plan again for less memory than a rank had none for."""
        assert self.plan is not None
        budget_bytes = int(self.plan.budget_bytes * _REPLAN_SHARE)
        return self._planned_again(self.job.with_changes({"budget": f"{budget_bytes}B"}))

    def for_workers(self, workers: int) -> Assignment:
        """Plan again for another number of workers."""
        return self._planned_again(self.job.resized(workers))

    def _planned_again(self, job: JobSpec) -> Assignment:
        if self.plan is not None:
            self.plan, machine = plan_of(job, None, self.display, address=self.address, is_beside=True)
            assert self.plan is not None
            self.plan.save(self.folder.plan)
            self.record = functools.partial(self.record, planned_on=machine)
        self.job = job
        self.record = functools.partial(self.record, running=job)
        self.record(status="running")
        return self._assignment()


def _lost_driver(log: MetricsLog) -> Event:
    """What is told when a run goes on whose driver ended without a word: nobody was there to decide anything."""
    step = max((event["step"] for event in log.read()), default=0)
    return failure_event(
        Failure(Cause.LOST_DRIVER, "the process that led this run was ended", rank=None),
        Decision("retry", "continuing from the last checkpoint"),
        step=step,
    )
