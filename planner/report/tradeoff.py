"""A sweep, the smallest budget and the largest batch in words and as objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cost_models.units import format_bytes
from planner.prepared import Prepared
from planner.report.summary import plan_lines, plan_object
from planner.report.text_table import text_table
from planner.residency import holder_objects, holders, peak_owner
from planner.tradeoff.largest_batch import LargestBatch
from planner.tradeoff.smallest import Smallest
from planner.tradeoff.sweep import Front

if TYPE_CHECKING:
    from planner.plan_file import Plan

_MAX_LINES = 8


def front_lines(front: Front) -> list[str]:
    """A table with one line a budget."""
    rows = []
    for point in front.points:
        share = point.budget_bytes / front.retained_all_peak_bytes if front.retained_all_peak_bytes else 1.0
        found = ("-", "-", "-", "-")
        if point.peak_bytes is not None:
            found = (
                format_bytes(point.peak_bytes),
                f"{point.extra_time_fraction:.2%}",
                str(point.num_rematerialized),
                f"{point.gap:.2%}",
            )
        peak, extra, again, gap = found
        rows.append(
            (
                format_bytes(point.budget_bytes),
                f"{share:.0%}",
                peak,
                extra,
                again,
                point.solver,
                point.status,
                gap,
            )
        )
    head = ("budget", "of retained-all", "peak", "extra time", "run again", "solver", "status", "gap")
    return text_table(head, rows)


def front_object(front: Front, prepared: Prepared[object]) -> dict[str, Any]:
    """The sweep for ``--json`` and ``--out``."""
    return {
        "status": "swept",
        **prepared.facts(),
        **smallest_facts(front.smallest, prepared),
        "points": [point.to_object() for point in front.points],
        "pareto": [{"peak_bytes": peak, "extra_time_fraction": extra} for peak, extra in front.pareto],
        "baselines": {name: [p.to_object() for p in points] for name, points in front.baselines.items()},
    }


def smallest_facts(smallest: Smallest, prepared: Prepared[object]) -> dict[str, Any]:
    """The smallest budget and what holds it up."""
    problem = prepared.problem
    return {
        "smallest_feasible_bytes": smallest.budget_bytes,
        "least_need_bytes": smallest.floor_bytes,
        "smallest_extra_time_fraction": problem.costed.extra_time_fraction(smallest.trace.time_s),
        "held_up_by": peak_owner(problem, smallest.schedule, smallest.trace),
        "held_up_by_values": holder_objects(problem, smallest.schedule, smallest.trace),
    }


def smallest_lines(smallest: Smallest, prepared: Prepared[object]) -> list[str]:
    """The smallest budget in words, and the largest values that are there at its peak."""
    facts = smallest_facts(smallest, prepared)
    whole = prepared.retained_all.peak_bytes
    share = smallest.budget_bytes / whole if whole else 1.0
    there = holders(prepared.problem, smallest.schedule, smallest.trace)
    lines = [
        f"everything retained  {format_bytes(whole)} peak",
        f"smallest budget      {format_bytes(smallest.budget_bytes)} ({smallest.budget_bytes} B, "
        f"{share:.0%} of it)",
        f"no plan at all       below {format_bytes(smallest.floor_bytes)}",
        f"extra time           {facts['smallest_extra_time_fraction']:.2%}, not minimized",
        f"held up by           {facts['held_up_by']}, while there are",
    ]
    for one in there[:_MAX_LINES]:
        what = f" ({one.op})" if one.op and one.op != "bare" else ""
        lines.append(
            f"  {format_bytes(one.size_bytes):>12}  {one.name}{what}{f' of {one.layer}' * bool(one.layer)}"
        )
    if len(there) > _MAX_LINES:
        rest = sum(one.size_bytes for one in there[_MAX_LINES:])
        lines.append(f"  {format_bytes(rest):>12}  {len(there) - _MAX_LINES} others")
    return lines


def batch_object(found: LargestBatch[Plan]) -> dict[str, Any]:
    """The largest batch and its plan for ``--json``."""
    return {
        "largest_batch": found.size,
        "refused_batch": found.refused.size,
        "refused_because": found.refused.reason,
        "refusal_proven": found.refused.proven,
        "scaling_exact": found.scaled,
        "num_captures": found.num_captures,
        **plan_object(found.plan),
    }


def batch_lines(found: LargestBatch[Plan]) -> list[str]:
    """The largest batch, why one more sample is too many, and its plan."""
    how = "scaled from two captures, checked by a third" if found.scaled else "each size captured"
    return [
        f"largest batch        {found.size} samples ({how}; {found.num_captures} captures)",
        f"one more             {found.refused.reason}" + ("" if found.refused.proven else " (not proven)"),
        *plan_lines(found.plan),
    ]
