"""A check in words and as an object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cost_models.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.checking.check import Check


def check_object(check: Check) -> dict[str, Any]:
    """The check for ``--json``; `extra_time_fraction` is the plan's, measured_... what its execution showed."""
    plan = check.plan
    return {
        **{f"{what}_equal": not name for what, name in check.different.items()},
        "first_difference": {what: name for what, name in check.different.items() if name},
        "largest_difference": check.difference,
        "executor": plan.provenance.executor,
        "budget_bytes": plan.budget_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "measured_peak_bytes": check.measured_peak_bytes,
        "eager_peak_bytes": check.eager_peak_bytes,
        "within_budget": check.is_within_budget,
        "prediction_error": check.prediction_error,
        "unexplained_bytes": check.unexplained_bytes,
        "plans_made": check.rounds,
        "eager_cpu_s": check.eager_cpu_s,
        "planned_cpu_s": check.planned_cpu_s,
        "extra_time_fraction": plan.extra_time_fraction,
        "measured_extra_time_fraction": check.planned_cpu_s / check.eager_cpu_s - 1.0,
        "num_nodes": plan.num_nodes,
        "num_rematerialized": plan.num_rematerialized,
        "retained_all_peak_bytes": plan.retained_all_peak_bytes,
        "status": plan.status,
        "solver": plan.solver,
        "gap": plan.gap,
        "solve_s": plan.solve_s,
        "cost_model": plan.provenance.cost_model,
    }


def check_lines(check: Check) -> list[str]:
    """The check for people."""
    plan = check.plan
    lines = [
        f"{what:<10} {'equal, bit for bit' if not name else _words(check, what, name)}"
        for what, name in check.different.items()
    ]
    lines += [
        f"peak       {format_bytes(check.measured_peak_bytes)} measured, "
        f"{format_bytes(plan.predicted_peak_bytes)} predicted ({check.prediction_error:+.2%}), "
        f"budget {format_bytes(plan.budget_bytes)}: "
        + ("held" if check.is_within_budget else "NOT HELD")
        + f"; eager {format_bytes(check.eager_peak_bytes)}",
        f"time       {format_seconds(check.planned_cpu_s)} a step, eager {format_seconds(check.eager_cpu_s)}: "
        f"{check.planned_cpu_s / check.eager_cpu_s - 1.0:+.1%} measured, {plan.extra_time_fraction:+.1%} planned",
        f"plan       {plan.num_rematerialized} of {plan.num_nodes} operations run again; {plan.status}, "
        f"gap {plan.gap:.2%}, {plan.solver}, {format_seconds(plan.solve_s)}",
    ]
    if check.rounds > 1:
        lines.append(
            f"corrected  {format_bytes(check.unexplained_bytes)} beyond the first prediction; {check.rounds} plans"
        )
    return lines


def _words(check: Check, what: str, name: str) -> str:
    """How far numbers are apart that are not equal; inductor promises no more than that they are close."""
    if check.plan.provenance.executor == "aten":
        return f"DIFFERENT, first in {name}"
    close = "close" if check.is_as_promised else "NOT CLOSE"
    return f"{close}: they differ by {check.difference[what]:.1e} of the largest, first in {name}"
