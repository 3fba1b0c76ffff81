"""Figures of a plan: data in, matplotlib Figure out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from planner.report.few_layers import MAX_LAYERS, TO, few_layers
from planner.report.replayed import STATIC, WORKSPACE, layer_timelines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from planner.bare_plan import BarePlan
    from planner.plan_file import Plan

# Okabe and Ito's palette, safe for colour-blind eyes; one colour a category in every figure.
COLOURS = {
    "plan": "#0072B2",
    "retained all": "#E69F00",
    "budget": "#D55E00",
    "static": "#999999",
    "measured": "#009E73",
}
# Tol's muted palette, for layers: safe as well, and none of the colours above.
_LAYER_COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#DDCC77", "#CC6677", "#AA4499", "#882255")
_WORKSPACE, _OTHER = "#555555", "#DDDDDD"
# Characters of an operation's name that the legend has room for.
_MAX_NAME = 28
assert len(_LAYER_COLOURS) == MAX_LAYERS


def saved(figure: Figure, kind: str) -> bytes:
    """A figure as a file's content.

    Args:
        figure: what is saved.
        kind: "png", "pdf" or "svg".
    """
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    return content.getvalue()


def memory_figure(plan: Plan | BarePlan, *, measured_peak_bytes: int | None = None) -> Figure:
    """Memory over the step with the plan, by layer where the plan knows its layers, and with everything retained.

    Args:
        plan: its timelines are drawn, one point an operation.
        measured_peak_bytes: drawn as a line if given.

    Returns:
        The figure; memory starts at 0, the budget is dashed.
    """
    from matplotlib.figure import Figure

    top = max(plan.retained_all_peak_bytes, plan.budget_bytes)
    unit, name = unit_of(top)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    areas = _areas(plan)
    if areas:
        heights = [_closed(area) / unit for area in areas.values()]
        edges = _edges(len(plan.timeline_bytes))
        axes.stackplot(
            edges, heights, labels=list(areas), colors=_area_colours(areas), step="post", linewidth=0
        )
    elif plan.static_bytes:
        axes.fill_between(
            (0, 100), plan.static_bytes / unit, color=COLOURS["static"], alpha=0.4, label="static"
        )
    for label, timeline in (
        ("retained all", plan.retained_all_timeline_bytes),
        ("plan", plan.timeline_bytes),
    ):
        # Both runs of the step have the same width, whatever the number of their operations.
        axes.step(
            _edges(len(timeline)),
            _closed(np.array(timeline)) / unit,
            where="post",
            color=COLOURS[label],
            linewidth=1.2,
            label=label,
        )
    _mark_peak(axes, plan, unit)
    axes.axhline(plan.budget_bytes / unit, color=COLOURS["budget"], linestyle="--", label="budget")
    if measured_peak_bytes is not None:
        axes.axhline(
            measured_peak_bytes / unit, color=COLOURS["measured"], linestyle=":", label="measured peak"
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.05 * top / unit if top else 1.0)
    axes.set_xlabel("operations of the step (%)")
    axes.set_ylabel(f"memory of one rank ({name})" if plan.hardware else f"memory ({name})")
    _legend_beside(figure, axes)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def unit_of(size_bytes: int) -> tuple[int, str]:
    """The unit in which a size has one to four digits before its point.

    >>> unit_of(3 << 20)
    (1048576, 'MiB')
    """
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit:
            return unit, name
    return 1, "B"


def _mark_peak(axes: Axes, plan: Plan | BarePlan, unit: int) -> None:
    """A mark where the plan peaks, with the operation's name; the optimizer's step comes after all others."""
    owner = plan.peak_owner if plan.hardware is not None else f"node {plan.peak_owner}"
    count, at = len(plan.timeline_bytes), 100.0
    if plan.timeline_bytes and max(plan.timeline_bytes) == plan.predicted_peak_bytes:
        at = 100.0 * (int(np.argmax(plan.timeline_bytes)) + 0.5) / count
    axes.plot(
        [at],
        [plan.predicted_peak_bytes / unit],
        color="black",
        marker="v",
        markersize=6,
        linestyle="none",
        label=f"peak: {owner if len(owner) <= _MAX_NAME else owner[: _MAX_NAME - 3] + '...'}",
        zorder=4,
        clip_on=False,
    )


def _areas(plan: Plan | BarePlan) -> dict[str, np.ndarray]:
    """Owner -> bytes at each computation: static memory, workspace, few layers that hold most, and the rest."""
    table = getattr(plan, "table", None)
    if table is None or len(table.layer_names) < 2:
        return {}
    deepest = max(name.count(".") + 1 for name in table.layer_names)
    timelines = layer_timelines(cast("Plan", plan), depth=deepest)
    static, workspace = timelines.pop(STATIC), timelines.pop(WORKSPACE)
    named, rest = few_layers(timelines)
    areas = {"static": static, "workspace": workspace, "other layers": rest}
    areas |= {_in_words(owner): area for owner, area in named.items()}
    return {owner: area for owner, area in areas.items() if area.any()}


def _in_words(owner: str) -> str:
    """A number alone says little: "layer 3", "layers 3-5"."""
    return f"layer{'s' * (TO in owner)} {owner}" if owner[0].isdigit() else owner


def _area_colours(areas: Mapping[str, object]) -> list[str]:
    fixed = {"static": COLOURS["static"], "workspace": _WORKSPACE, "other layers": _OTHER}
    colours = iter(_LAYER_COLOURS)
    return [fixed.get(owner) or next(colours) for owner in areas]


def _edges(count: int) -> np.ndarray:
    """Where each of `count` operations begins and the last one ends, in per cent of the step."""
    return np.linspace(0.0, 100.0, count + 1)


def _closed(timeline: np.ndarray) -> np.ndarray:
    """The last operation lasts to the end of the step."""
    return np.append(timeline, timeline[-1:]) if len(timeline) else np.zeros(1)


def _legend_beside(figure: Figure, axes: Axes) -> None:
    """The legend to the right of the axes, the topmost area first, lines above areas."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [
        (h, one)
        for h, one in zip(handles, labels, strict=True)
        if hasattr(h, "get_linestyle") and not hasattr(h, "get_paths")
    ]
    areas = [(h, one) for h, one in zip(handles, labels, strict=True) if hasattr(h, "get_paths")]
    shown = [*lines, *reversed(areas)]
    figure.legend(
        [h for h, _ in shown],
        [one for _, one in shown],
        loc="outside right upper",
        frameon=False,
        fontsize="small",
    )
