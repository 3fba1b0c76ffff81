"""HiGHS through PuLP, with what PuLP leaves out: a warm start, the proven bound, an honest status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import highspy
import pulp

from planner.errors import SolverError


@dataclass(frozen=True)
class SolveOutcome:
    """What one call of the solver proved and found.

    Attributes:
        has_values: the variables hold a feasible point.
        optimal: proven within the asked gap.
        infeasible: proven that no feasible point exists.
        objective: of the point; inf without one.
        bound: no feasible point has less; -inf if nothing is proven.
    """

    has_values: bool
    optimal: bool
    infeasible: bool
    objective: float
    bound: float


class _HighsWithStart(pulp.HiGHS):
    """PuLP's HiGHS, started from given values of some variables."""

    start: dict[str, float] | None = None

    def createAndConfigureSolver(self, lp: Any) -> None:  # noqa: N802 (PuLP's name)
        """Make the model that HiGHS holds."""
        silence()
        super().createAndConfigureSolver(lp)

    def callSolver(self, lp: Any) -> None:  # noqa: N802 (PuLP's name)
        """Hand over the start, then run."""
        if self.start:
            pairs = [(v.index, self.start[v.name]) for v in lp.variables() if v.name in self.start]
            indices = [index for index, _ in pairs]
            values = [value for _, value in pairs]
            lp.solverModel.setSolution(len(indices), indices, values)
        run(lp.solverModel)


class _Silent(highspy.Highs):
    """A model that asks for silence before anything else is done with it."""

    def enableCallbacks(self) -> None:  # noqa: N802 (HiGHS's name)
        """The first thing that making a model does."""
        self.setOptionValue("log_to_console", False)
        super().enableCallbacks()


@cache
def silence() -> None:
    """Keep the header of HiGHS off standard output: 1.16 prints it while the first model of a process is made."""
    _Silent()


def run(highs: highspy.Highs) -> None:
    """Run the model that HiGHS holds.

    HiGHS keeps one pool of threads in a process and refuses another number of them until it is reset.

    Raises:
        SolverError: HiGHS reports an error of its own.
    """
    highspy.Highs.resetGlobalScheduler(True)
    try:
        failed = highs.run() == highspy.HighsStatus.kError
    except RuntimeError as error:
        raise SolverError(
            f"HiGHS {highs.version()} failed: {error}. Report the model and the version."
        ) from error
    if failed:
        raise SolverError(
            f"HiGHS {highs.version()} failed on a model of {highs.getNumCol()} variables. "
            "Report the model and the version."
        )


def outcome_of(
    highs: highspy.Highs, objective: Callable[[], float], *, mip: bool, abs_gap: float
) -> SolveOutcome:
    """What the last run of a minimization proved and found.

    HiGHS 1.16 reports objective and bound 0 where the optimum is the start that it was given, so the objective is
    that of the point itself, and a proven optimum has the bound that this proves.

    Args:
        highs: holds the model.
        objective: of the point that was found.
        mip: whether the run kept integrality.
        abs_gap: what the run was asked to prove.
    """
    status = highs.getModelStatus()
    info = highs.getInfo()
    optimal = status == highspy.HighsModelStatus.kOptimal
    feasible = info.primal_solution_status == 2  # kSolutionStatusFeasible
    value = objective() if feasible else float("inf")
    reported = info.mip_dual_bound if mip else float("-inf")
    proven = value - (abs_gap if mip else 0.0) if optimal else float("-inf")
    return SolveOutcome(
        has_values=feasible,
        optimal=optimal,
        infeasible=status
        in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible),
        objective=value,
        bound=max(reported, proven),
    )


def run_highs(
    model: pulp.LpProblem,
    *,
    mip: bool,
    time_limit_s: float,
    abs_gap: float,
    threads: int,
    start: dict[str, float] | None = None,
) -> SolveOutcome:
    """Solve a PuLP model with HiGHS in this process.

    PuLP reports "optimal" for an incumbent at the time limit; status, objective and bound are read from HiGHS
    itself. The variables of the model hold the point afterwards.

    Args:
        model: a minimization.
        mip: keep integrality; False solves the relaxation.
        time_limit_s: wall-clock seconds.
        abs_gap: stop when objective - bound is no more.
        threads: of HiGHS.
        start: variable name -> value; HiGHS completes a partial one.

    Returns:
        What was proven and found.

    Raises:
        SolverError: HiGHS reports an error of its own.
    """
    solver = _HighsWithStart(
        mip=mip, msg=False, timeLimit=max(0.1, time_limit_s), gapAbs=abs_gap, gapRel=0.0, threads=threads
    )
    solver.start = start
    try:
        model.solve(solver)
    except pulp.PulpSolverError as error:
        raise SolverError(f"HiGHS cannot be used: {error}. Install highspy again.") from error
    highs: highspy.Highs = model.solverModel  # type: ignore[assignment]
    cost: Any = model.objective
    return outcome_of(highs, lambda: float(cost.value()), mip=mip, abs_gap=abs_gap)
