"""The figure of a sweep: peak memory against extra time, with the baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.report.plots import COLOURS, unit_of
from planner.tradeoff.sweep import Front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour and marker, so that they differ without colour too.
_BASELINES = {
    "chen_sqrt": ("#CC79A7", "s", "Chen, square root"),
    "chen_greedy": ("#E69F00", "^", "Chen, greedy"),
    "griewank": ("#56B4E9", "D", "Griewank"),
}


def front_figure(front: Front) -> Figure:
    """Least extra time within a budget over all plans found, as a staircase, and what each baseline needs.

    Args:
        front: a sweep.

    Returns:
        The figure; both axes start at 0, time is logarithmic above 1 %. An open marker is a plan that is not proven
        within the solver's gap.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    unit, name = unit_of(front.retained_all_peak_bytes)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for baseline, points in front.baselines.items():
        colour, marker, label = _BASELINES[baseline]
        axes.plot(
            [point.peak_bytes / unit for point in points if point.peak_bytes is not None],
            [100.0 * point.extra_time_fraction for point in points if point.extra_time_fraction is not None],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=":",
            linewidth=0.8,
            label=label,
        )
    found = [p for p in front.points if p.peak_bytes is not None and p.extra_time_fraction is not None]
    peaks = [(p.peak_bytes or 0) / unit for p in found]
    extras = [100.0 * (p.extra_time_fraction or 0.0) for p in found]
    axes.step(
        [peak / unit for peak, _ in front.pareto],
        [100.0 * extra for _, extra in front.pareto],
        where="post",
        color=COLOURS["plan"],
        linewidth=1.5,
        zorder=3,
    )
    axes.plot([], [], color=COLOURS["plan"], marker="o", label="plan")
    for proven in (True, False):
        chosen = [i for i, p in enumerate(found) if (p.status == "optimal") == proven]
        if not chosen:
            continue  # the layout makes room for unclipped markers, and for those of no points at the corner
        axes.plot(
            [peaks[i] for i in chosen],
            [extras[i] for i in chosen],
            linestyle="none",
            marker="o",
            color=COLOURS["plan"],
            markerfacecolor=COLOURS["plan"] if proven else "white",
            label=None if proven else "plan, not proven within the gap",
            zorder=4,
            clip_on=False,
        )
    lowest = front.smallest.budget_bytes / unit
    axes.axvline(
        lowest, color=COLOURS["budget"], linestyle="--", linewidth=1.0, label="smallest budget found"
    )
    axes.set_xlim(0, 1.03 * front.retained_all_peak_bytes / unit if front.retained_all_peak_bytes else 1.0)
    # Tight budgets cost hundreds of per cent, roomy ones tenths of one: both are to be read.
    axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    highest = max(
        [*extras, *(100.0 * (p.extra_time_fraction or 0.0) for one in front.baselines.values() for p in one)],
        default=0.0,
    )
    axes.set_ylim(0, max(1.0, 1.5 * highest))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"peak memory ({name})")
    axes.set_ylabel("extra time (% of the step)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure
