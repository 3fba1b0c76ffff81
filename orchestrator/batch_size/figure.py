"""Figures of `lowtide batch-size`: steps against batch with the fitted curve and its regions; branches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.batch_size.branched import TOLERANCE, Branches
from orchestrator.batch_size.critical_batch import CriticalBatch, RunSteps, median_steps, regions
from orchestrator.batch_size.report import mean_noise
from orchestrator.batch_size.results_file import SweepFound
from orchestrator.batch_size.sweep import outcomes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours; the regions in the lightest tints of three of them.
_RUNS, _FIT, _NOISE, _PERFECT = "#000000", "#0072B2", "#D55E00", "#666666"
_REGIONS = (
    ("perfect\nscaling", "#009E73"),
    ("diminishing\nreturns", "#F0E442"),
    ("maximal data\nparallelism", "#CC79A7"),
)
_SHADE = 0.13


def sweep_figure(found: SweepFound, fit: CriticalBatch, *, first_seed: int) -> Figure:
    """Steps to the target against batch: runs, fit, perfect scaling, regions, and the noise scale.

    Args:
        found: the runs, and the noise scale along one of them.
        fit: of their hyperbola.
        first_seed: that chose the rates.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    runs = outcomes(found.runs, first_seed=first_seed)
    medians = median_steps(runs)
    sizes = [median.batch for median in medians]
    known = [point.value for point in found.noise if point.value]
    ends = 0.7 * min(sizes), 1.4 * max([*sizes, *known])
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if 0 < fit.b_crit < math.inf:
        _draw_regions(axes, fit, ends)
        _draw_fit(axes, fit, ends)
    _draw_runs(axes, runs)
    mean = mean_noise(found.noise, batch=found.noise_batch)
    if mean is not None:
        axes.axvline(mean, color=_NOISE, label=f"noise scale on the way, mean {mean:.3g}")
        label = f"noise scale on the way, {min(known):.3g} to {max(known):.3g}"
        axes.axvspan(min(known), max(known), ymax=0.035, color=_NOISE, alpha=0.5, linewidth=0, label=label)
    axes.set_xlim(*ends)
    axes.set_ylim(0.6 * min(median.steps for median in medians), 1.6 * max(run.steps for run in runs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel("batch size (examples)")
    axes.set_ylabel(f"steps to the training loss {found.target_loss:g}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_regions(axes: Axes, fit: CriticalBatch, ends: tuple[float, float]) -> None:
    """A tint and a name for each region that is in sight."""
    cut, (left, right) = regions(fit.b_crit), ends
    inner = [min(max(edge, left), right) for edge in (cut.perfect_until, cut.maximal_from)]
    for (name, colour), (start, end) in zip(_REGIONS, itertools.pairwise([left, *inner, right]), strict=True):
        if end > start:
            axes.axvspan(start, end, color=colour, alpha=_SHADE, linewidth=0)
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(math.sqrt(start * end), 1.01, name, fontsize=8, **place)


def _draw_fit(axes: Axes, fit: CriticalBatch, ends: tuple[float, float]) -> None:
    """The curve, perfect scaling, and the critical batch with its interval."""
    grid = np.geomspace(*ends, 200)
    axes.plot(grid, fit.s_min + fit.e_min / grid, color=_FIT, label="fit $S = S_{min}\\,(1 + B_{crit}/B)$")
    axes.plot(grid, fit.e_min / grid, color=_PERFECT, linestyle="--", label="perfect scaling $S = E_{min}/B$")
    low, high = fit.b_crit_interval
    steps = fit.steps(fit.b_crit)
    label = f"critical batch {fit.b_crit:.3g}, {low:.3g} to {high:.3g} at {fit.confidence:.0%}"
    axes.plot(
        [fit.b_crit], [steps], color=_FIT, marker="D", markersize=7, linestyle="none", label=label, zorder=4
    )
    axes.plot([max(low, ends[0]), min(high, ends[1])], [steps, steps], color=_FIT, linewidth=1.5, zorder=3)


def _draw_runs(axes: Axes, runs: Sequence[RunSteps]) -> None:
    """A dot a run at the best rate of its batch, a ring at their median, a triangle where it is not known."""
    medians = median_steps(runs)
    kinds = (
        ("a run at the best rate", "o", "full", 3, [run for run in runs if run.reached]),
        ("median of the seeds", "o", "none", 7, [median for median in medians if median.reached]),
        ("target not reached by then", "^", "none", 7, [median for median in medians if not median.reached]),
    )
    for label, marker, fill, size, shown in kinds:
        if shown:
            axes.plot(
                [one.batch for one in shown],
                [one.steps for one in shown],
                color=_RUNS,
                marker=marker,
                fillstyle=fill,
                markersize=size,
                linestyle="none",
                label=label,
            )


def branches_figure(branches: Branches, *, batch: int) -> Figure:
    """Progress lost against the batch, with the most that counts as nothing.

    Args:
        branches: as judged.
        batch: of factor 1.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    shown = [branch for branch in branches.branches if math.isfinite(branch.bound_share)]
    sizes = [branch.factor * batch for branch in shown]
    axes.errorbar(
        sizes,
        [100 * branch.lost_share for branch in shown],
        yerr=[[0.0] * len(shown), [100 * (branch.bound_share - branch.lost_share) for branch in shown]],
        color=_FIT,
        marker="o",
        capsize=3,
        label="mean, and its one-sided 95 % bound",
    )
    axes.axhline(100 * TOLERANCE, color=_NOISE, linestyle="--", label="most that counts as nothing")
    axes.axhline(0.0, color=_PERFECT, linewidth=0.8)
    axes.axvline(branches.factor * batch, color=_PERFECT, linestyle=":", label="largest that loses nothing")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("batch size (examples)")
    axes.set_ylabel("progress lost (% of the fall of the loss)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
