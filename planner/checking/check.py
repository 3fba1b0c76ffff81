"""A plan executed beside eager: are the results equal, is the promised peak held, what does it cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from planner.checking.calibrated import Calibrated, calibrated_plan
from planner.checking.compare import first_difference, largest_difference
from planner.checking.node_times import with_measured_times
from planner.checking.real_step import RealStep, interleaved
from planner.inputs.workload import SolverSpec
from planner.plan_file import Plan
from planner.prepared import Prepared

# Rounding adds up over the layers of a step; numbers that are wrong differ by more.
_CLOSE = 1e-2
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """What a plan promised and what its execution did.

    Attributes:
        plan: that was executed.
        different: "outputs", "gradients", "buffers" -> name of the first that differs from eager's, "" for none.
        difference: the same -> largest absolute difference over the largest absolute number.
        measured_peak_bytes: of the planned step.
        eager_peak_bytes: of the eager one.
        eager_cpu_s: median processor seconds of an eager step (seconds on the device for CUDA).
        planned_cpu_s: of a planned one; the two took turns.
        unexplained_bytes: what the first plan's step took beyond its prediction, charged since.
        rounds: plans that were made until the measured step fitted.
    """

    plan: Plan
    different: dict[str, str]
    difference: dict[str, float]
    measured_peak_bytes: int
    eager_peak_bytes: int
    eager_cpu_s: float
    planned_cpu_s: float
    unexplained_bytes: int
    rounds: int

    @property
    def is_exact(self) -> bool:
        """Whether outputs, gradients and buffers are those of eager, bit for bit."""
        return not any(self.different.values())

    @property
    def is_as_promised(self) -> bool:
        """Whether they are what the executor promises: the bits of eager, or its numbers up to rounding."""
        if self.plan.provenance.executor == "aten":
            return self.is_exact
        return max(self.difference.values()) <= _CLOSE

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak is within the budget."""
        return self.measured_peak_bytes <= self.plan.budget_bytes

    @property
    def prediction_error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.plan.predicted_peak_bytes - self.measured_peak_bytes) / self.measured_peak_bytes


def check(
    prepared: Prepared[Plan],
    module: nn.Module,
    step: RealStep,
    *,
    budget: str,
    solver: SolverSpec,
    rounds: int = 5,
    tightest: bool = False,
    measure_times: bool = True,
    tell: Tell = lambda line: None,
) -> Check:
    """Plan a real step, execute it beside eager from the same weights and seeds, and compare.

    Args:
        prepared: the step of the module.
        module: real, in training mode; copies of it run.
        step: its batch, loss and optimizer.
        budget: as a user states it.
        solver: which one, and how long.
        rounds: of timing.
        tightest: where no plan fits, check the one of the smallest budget that was found.
        measure_times: price the operations with measured seconds first.
        tell: called with a line of progress.

    Raises:
        InfeasibleError: no plan fits the budget.
        PlanMismatchError: the module is not the one that was prepared.
    """
    if measure_times:
        tell("measuring every operation")
        prepared = with_measured_times(prepared, copy.deepcopy(module), step)
    tell("planning and measuring")
    planned = calibrated_plan(prepared, module, step, budget=budget, solver=solver, tightest=tightest)
    return beside_eager(planned, module, step, rounds=rounds, tell=tell)


def beside_eager(
    planned: Calibrated, module: nn.Module, step: RealStep, *, rounds: int, tell: Tell = lambda line: None
) -> Check:
    """Compare a plan's execution with eager; arguments and errors as for `check`."""
    tell("running beside eager")
    eager = step.on(copy.deepcopy(module))
    left = eager.measured(seed=0)
    eager_peak_bytes = eager.measured(seed=1).peak_bytes
    seconds = interleaved({"eager": eager, "planned": planned.running}, rounds=rounds)
    return Check(
        plan=planned.plan,
        different=first_difference(left, planned.first),
        difference=largest_difference(left, planned.first),
        measured_peak_bytes=planned.measured_peak_bytes,
        eager_peak_bytes=eager_peak_bytes,
        eager_cpu_s=seconds["eager"],
        planned_cpu_s=seconds["planned"],
        unexplained_bytes=planned.unexplained_bytes,
        rounds=planned.rounds,
    )
