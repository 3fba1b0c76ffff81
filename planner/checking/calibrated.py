"""A plan whose measured step is within the budget: what it takes beyond its prediction is charged."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass

from torch import nn

from cost_models.units import format_bytes
from planner.checking.real_step import Left, RealStep, Running
from planner.errors import InfeasibleError
from planner.inputs.workload import SolverSpec
from planner.lower.module import PlannedModule
from planner.plan_file import Plan
from planner.prepared import Prepared, plan_within
from planner.problem import Budget, BudgetKind

_log = logging.getLogger(__name__)
# Plans made at most; each is corrected by what the one before took.
_MAX_ROUNDS = 4


@dataclass(frozen=True)
class Calibrated:
    """A plan and what its execution took.

    Attributes:
        plan: with the correction in its static bytes and in its prediction.
        running: the step on the planned module.
        first: what its very first step left, from the weights of the given module.
        measured_peak_bytes: of its second step; the first one may allocate what stays.
        unexplained_bytes: the correction; 0 where the first prediction held.
        rounds: plans that were made.
    """

    plan: Plan
    running: Running
    first: Left
    measured_peak_bytes: int
    unexplained_bytes: int
    rounds: int


def calibrated_plan(
    prepared: Prepared[Plan],
    module: nn.Module,
    step: RealStep,
    *,
    budget: str,
    solver: SolverSpec,
    tightest: bool = False,
) -> Calibrated:
    """Plan, run one step and measure it; where it takes more than the budget, charge the difference and plan again.

    Args:
        prepared: the step of the module.
        module: real; copies of it run.
        step: its batch, loss and optimizer.
        budget: as a user states it. A share is of the peak that is predicted with everything retained.
        solver: which one, and how long.
        tightest: where no plan fits the budget, take the one of the smallest budget that was found.

    Returns:
        The last plan. Its measured peak is above its budget only where no round could correct it, which is said
        in the log.

    Raises:
        InfeasibleError: no plan fits, or none that is left after the correction.
    """
    budget_bytes = prepared.budgeted(budget).budget_bytes
    is_limited = Budget.parse(budget).kind is not BudgetKind.NONE
    unexplained, rounds = 0, 0
    while True:
        rounds += 1
        corrected = _charged(prepared, unexplained)
        if not is_limited:
            budget_bytes = corrected.retained_all.peak_bytes
        try:
            plan = plan_within(
                corrected,
                budget=f"{budget_bytes}B",
                time_limit_s=solver.time_limit_s,
                gap=solver.gap_share,
                solver=solver.name,
                free_order=solver.free_order,
            )
        except InfeasibleError as error:
            if not tightest or error.plan is None:
                raise
            plan, budget_bytes = error.plan, error.smallest_feasible_bytes
        running = step.on(PlannedModule(copy.deepcopy(module), plan))
        first = running.measured(seed=0)
        measured = running.measured(seed=1).peak_bytes
        if measured <= budget_bytes or rounds == _MAX_ROUNDS:
            break
        unexplained += measured - plan.predicted_peak_bytes
    if measured > budget_bytes:
        _log.warning(
            "after %d plans the measured peak, %s, is still above the budget of %s",
            rounds,
            format_bytes(measured),
            format_bytes(budget_bytes),
        )
    return Calibrated(plan, running, first, measured, unexplained, rounds)


def _charged(prepared: Prepared[Plan], unexplained_bytes: int) -> Prepared[Plan]:
    """The step with some more bytes that are always there."""
    static = dataclasses.replace(prepared.problem.static, unexplained_bytes=unexplained_bytes)
    return prepared.with_problem(dataclasses.replace(prepared.problem, static=static))
