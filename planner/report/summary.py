"""A plan in words: five lines for people, one object for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cost_models.units import format_bytes, format_seconds
from planner.errors import InfeasibleError

if TYPE_CHECKING:
    from planner.bare_plan import BarePlan
    from planner.plan_file import Plan


def plan_lines(plan: Plan | BarePlan) -> list[str]:
    """What a plan promises, in five lines."""
    share = plan.budget_bytes / plan.retained_all_peak_bytes if plan.retained_all_peak_bytes else 1.0
    if plan.hardware is None:
        owner = f"node {plan.peak_owner}"
        step = f"a cost of {plan.step_s:g}"
        remade = f"{plan.num_rematerialized} runs beyond the first of each node"
    else:
        owner = plan.peak_owner
        step = f"{format_seconds(plan.step_s)} on {plan.hardware}"
        remade = f"{plan.num_rematerialized} of {plan.num_forward} forward operations run twice"
    return [
        f"everything retained  {format_bytes(plan.retained_all_peak_bytes)} peak "
        f"({format_bytes(plan.static_bytes)} of it static)",
        f"budget               {format_bytes(plan.budget_bytes)} ({share:.0%} of it)",
        f"predicted peak       {format_bytes(plan.predicted_peak_bytes)} at {owner}",
        f"extra time           {plan.extra_time_fraction:.2%} of {step} ({remade})",
        f"solver               {plan.solver}: {plan.status}, gap {plan.gap:.2%}, {plan.solve_s:.1f} s, "
        f"{plan.num_nodes} operations",
    ]


def plan_object(plan: Plan | BarePlan) -> dict[str, Any]:
    """The numbers of a plan for ``--json``."""
    return {
        "status": plan.status,
        "solver": plan.solver,
        "peak_bytes": plan.predicted_peak_bytes,
        "retained_all_peak_bytes": plan.retained_all_peak_bytes,
        "static_bytes": plan.static_bytes,
        "budget_bytes": plan.budget_bytes,
        "extra_time_fraction": plan.extra_time_fraction,
        "gap": plan.gap,
        "solve_s": plan.solve_s,
        "num_nodes": plan.num_nodes,
        "num_rematerialized": plan.num_rematerialized,
        "peak_owner": plan.peak_owner,
        "hardware": plan.hardware,
        "graph_hash": plan.graph_hash,
    } | ({} if plan.hardware is None else {"energy_j": plan.energy_j})


def infeasible_object(error: InfeasibleError) -> dict[str, Any]:
    """The numbers of an answer "no plan fits" for ``--json``."""
    return {
        "status": "infeasible",
        "budget_bytes": error.budget_bytes,
        "smallest_feasible_bytes": error.smallest_feasible_bytes,
        "held_up_by": error.owner,
        **error.facts,
        "message": str(error),
    }
