"""The device ran out of memory in spite of a plan: an error that says what was promised and what to ask for."""

from __future__ import annotations

from typing import Any

import torch

from cost_models.units import format_bytes
from planner.lower.executor import Boxed, Executor, marked_boxed
from planner.plan_file import Plan

# Share of the memory that the process can have which a new plan should take: allocators round up and fragment.
_SHARE = 0.95


class StepOutOfMemoryError(torch.OutOfMemoryError):
    """The device had no memory left while a planned step ran.

    Attributes:
        predicted_peak_bytes: of the plan.
        measured_peak_bytes: most that the allocator had given out until then; None where it keeps no count.
        owner: operation at which the plan peaks.
        budget_to_ask_for_bytes: with which to plan again.
    """

    def __init__(self, plan: Plan, *, measured_peak_bytes: int | None, usable_bytes: int | None) -> None:
        self.predicted_peak_bytes = plan.predicted_peak_bytes
        self.measured_peak_bytes = measured_peak_bytes
        self.owner = plan.peak_owner
        most = plan.predicted_peak_bytes
        excess = max(0, (measured_peak_bytes or 0) - plan.predicted_peak_bytes)
        self.budget_to_ask_for_bytes = max(
            1, int(_SHARE * (min(most, usable_bytes) if usable_bytes else most)) - excess
        )
        measured = "" if measured_peak_bytes is None else f", measured {format_bytes(measured_peak_bytes)}"
        usable = (
            ""
            if usable_bytes is None
            else f"; this process can have {format_bytes(usable_bytes)} of the device"
        )
        super().__init__(
            f"the device is out of memory in spite of the plan: predicted peak "
            f"{format_bytes(plan.predicted_peak_bytes)} at {plan.peak_owner}{measured}{usable}. Plan again with "
            f"a budget of {self.budget_to_ask_for_bytes} B, or free what else lies on the device."
        )


def explaining(executor: Executor, plan: Plan) -> Executor:
    """The executor, its functions raising StepOutOfMemoryError where the device has no memory left.

    Args:
        executor: makes the functions.
        plan: that they execute.
    """

    def make(half: torch.fx.GraphModule, example_inputs: Any) -> Boxed:
        run = executor(half, example_inputs)

        def call(arguments: list[Any]) -> Any:
            try:
                return run(arguments)
            except torch.OutOfMemoryError as error:
                raise _explained(plan) from error

        return marked_boxed(call)

    return make


def _explained(plan: Plan) -> StepOutOfMemoryError:
    if plan.signature.device != "cuda":
        return StepOutOfMemoryError(plan, measured_peak_bytes=None, usable_bytes=None)
    free_bytes, _ = torch.cuda.mem_get_info()
    return StepOutOfMemoryError(
        plan,
        measured_peak_bytes=torch.cuda.max_memory_allocated(),
        usable_bytes=free_bytes + torch.cuda.memory_reserved(),
    )
