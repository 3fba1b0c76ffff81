"""A solver's answer: a status, a schedule or none, and how good it is known to be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from planner.schedule import Schedule


class Status(Enum):
    """The four answers of a search."""

    OPTIMAL = "optimal"  # proven within the asked gap
    FEASIBLE = "feasible"  # a schedule, with a larger gap
    INFEASIBLE = "infeasible"  # proven: this formulation has no schedule within the budget
    NOT_FOUND = "not_found"  # time ran out first


@dataclass(frozen=True)
class Solution:
    """Outcome of one solve.

    Attributes:
        status: one of four.
        schedule: instructions, or None without one.
        time_s: seconds of the step under the schedule; inf without one.
        bound_s: no schedule of the formulation takes less; 0.0 if nothing is known.
        solve_s: wall-clock seconds of the search.
        solver: name of the algorithm.
    """

    status: Status
    schedule: Schedule | None
    time_s: float
    bound_s: float
    solve_s: float
    solver: str

    @property
    def gap(self) -> float:
        """Share of the step's time that is not proven necessary: (time_s - bound_s) / time_s."""
        if self.schedule is None:
            return float("inf")
        return max(0.0, (self.time_s - self.bound_s) / self.time_s) if self.time_s > 0.0 else 0.0
