"""Figures of a plan: data in, matplotlib Figure out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from planner.bare_answer import BareAnswer
    from planner.plan_file import Plan

# Okabe and Ito's palette, safe for colour-blind eyes; one colour a category in every figure.
COLOURS = {
    "plan": "#0072B2",
    "retained all": "#E69F00",
    "budget": "#D55E00",
    "static": "#999999",
    "measured": "#009E73",
}
_GIB = 2**30
_MIB = 2**20


def saved(figure: Figure, kind: str) -> bytes:
    """A figure as a file's content.

    Args:
        figure: what is saved.
        kind: "png", "pdf" or "svg".
    """
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    return content.getvalue()


def memory_figure(plan: Plan | BareAnswer, *, measured_peak_bytes: int | None = None) -> Figure:
    """Memory over the step: with the plan, and with everything retained.

    Args:
        plan: its timelines are drawn, one point an operation.
        measured_peak_bytes: drawn as a line if given.

    Returns:
        The figure; memory starts at 0, the budget is dashed.
    """
    from matplotlib.figure import Figure

    top = max(plan.retained_all_peak_bytes, plan.budget_bytes)
    unit, name = (_GIB, "GiB") if top >= _GIB else (_MIB, "MiB")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, timeline in (
        ("retained all", plan.retained_all_timeline_bytes),
        ("plan", plan.timeline_bytes),
    ):
        # Both runs of the step have the same width, whatever the number of their operations.
        share = [100.0 * (i + 0.5) / len(timeline) for i in range(len(timeline))]
        axes.step(share, [b / unit for b in timeline], where="mid", color=COLOURS[label], label=label)
    axes.axhline(plan.budget_bytes / unit, color=COLOURS["budget"], linestyle="--", label="budget")
    if measured_peak_bytes is not None:
        axes.axhline(
            measured_peak_bytes / unit, color=COLOURS["measured"], linestyle=":", label="measured peak"
        )
    axes.fill_between([0, 100], plan.static_bytes / unit, color=COLOURS["static"], alpha=0.4, label="static")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("operations of the step (%)")
    axes.set_ylabel(f"memory of one rank ({name})")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
