"""What the planner raises.

ValueError
├── CaptureError        the model's step cannot be captured as one graph
├── InfeasibleError     no plan was found that meets the budget
└── PlanMismatchError   the plan was made for another model, batch or torch

RuntimeError
├── CompilerError       the executor has no compiler for the device
└── SolverError         a solver itself failed

torch.OutOfMemoryError
└── StepOutOfMemoryError  the device had no memory left in spite of a plan (planner.lower.out_of_memory)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.solution import Solution


class CaptureError(ValueError):
    """The model's step cannot be captured as one graph; the message names the line and what to do."""


class PlanMismatchError(ValueError):
    """The plan was made for something else; the message names the first difference."""


class InfeasibleError(ValueError):
    """No plan was found that meets the budget.

    Attributes:
        budget_bytes: what was asked.
        smallest_feasible_bytes: the smallest budget for which a plan is known.
        owner: the operation at whose time that plan peaks.
        smallest: the answer for that budget, where a solver gave one.
        plan: its plan, where the step can be planned; None for a problem alone.
        facts: what else is known of the problem, for ``--json``.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int,
        smallest_feasible_bytes: int,
        owner: str,
        smallest: Solution | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_feasible_bytes = smallest_feasible_bytes
        self.owner = owner
        self.smallest = smallest
        self.plan: Any = None
        self.facts: dict[str, Any] = {}


class CompilerError(RuntimeError):
    """The executor cannot compile for the device; the message says what to install or to ask for."""


class SolverError(RuntimeError):
    """The solver itself failed; nothing is known about the problem."""
