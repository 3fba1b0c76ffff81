"""Figures of `lowtide batch-size`: steps against batch with the fitted curve and its regions; branches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.batch_size.branched import TOLERANCE, Branches
from orchestrator.batch_size.critical_batch import CriticalBatch, median_steps, regions
from orchestrator.batch_size.results_file import SweepFound
from orchestrator.batch_size.sweep import outcomes
from orchestrator.batch_size_report import mean_noise

if TYPE_CHECKING:
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

    runs = outcomes(found.runs, first_seed=first_seed)
    medians = median_steps(runs)
    sizes = [median.batch for median in medians]
    mean = mean_noise(found.noise)
    known = [point.value for point in found.noise if point.value]
    left, right = 0.7 * min(sizes), 1.4 * max([*sizes, *known])
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    grid = np.geomspace(left, right, 200)
    top = 1.6 * max(run.steps for run in runs)
    if 0 < fit.b_crit < math.inf:
        cut = regions(fit.b_crit)
        edges = [
            left,
            min(max(cut.perfect_until, left), right),
            min(max(cut.maximal_from, left), right),
            right,
        ]
        for (name, colour), start, end in zip(_REGIONS, edges, edges[1:], strict=False):
            if end > start:
                axes.axvspan(start, end, color=colour, alpha=_SHADE, linewidth=0)
                axes.text(
                    math.sqrt(start * end),
                    0.985,
                    name,
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    va="top",
                    fontsize=8,
                )
        low, high = fit.b_crit_interval
        axes.plot(
            [fit.b_crit],
            [fit.steps(fit.b_crit)],
            color=_FIT,
            marker="D",
            markersize=7,
            linestyle="none",
            label=f"critical batch {fit.b_crit:.3g} ({low:.3g} to {high:.3g} at {fit.confidence:.0%})",
            zorder=4,
        )
        axes.plot(
            [max(low, left), min(high, right)],
            [fit.steps(fit.b_crit)] * 2,
            color=_FIT,
            linewidth=1.5,
            zorder=3,
        )
        perfect = fit.e_min / grid
    else:
        perfect = medians[0].steps * medians[0].batch / grid
    if math.isfinite(fit.b_crit) and fit.b_crit > 0:
        axes.plot(
            grid, [fit.steps(size) for size in grid], color=_FIT, label="fit: $S = S_{min}(1 + B_{crit}/B)$"
        )
    axes.plot(grid, perfect, color=_PERFECT, linestyle="--", label="perfect scaling: $S = E_{min}/B$")
    shown = [run for run in runs if run.reached]
    axes.plot(
        [run.batch for run in shown],
        [run.steps for run in shown],
        color=_RUNS,
        marker="o",
        markersize=3,
        alpha=0.45,
        linestyle="none",
        label="runs at the best rate, each seed",
    )
    reached = [median for median in medians if median.reached]
    axes.plot(
        [median.batch for median in reached],
        [median.steps for median in reached],
        color=_RUNS,
        marker="o",
        markersize=6,
        fillstyle="none",
        linestyle="none",
        label="median",
    )
    lost = [median for median in medians if not median.reached]
    if lost:
        axes.plot(
            [median.batch for median in lost],
            [median.steps for median in lost],
            color=_RUNS,
            marker="^",
            linestyle="none",
            label="target not reached by then",
        )
    if mean is not None:
        axes.axvline(mean, color=_NOISE, label=f"noise scale on the way: mean {mean:.3g}")
        axes.axvspan(
            min(known), max(known), ymax=0.035, color=_NOISE, alpha=0.5, linewidth=0,
            label=f"its range: {min(known):.3g} to {max(known):.3g}",
        )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(0.6 * min(median.steps for median in medians), top)
    axes.set_xlabel("batch size (examples)")
    axes.set_ylabel(f"steps to the training loss {found.target_loss:g}")
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.94))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def branches_figure(branches: Branches, *, batch: int) -> Figure:
    """Progress lost against the batch, with the most that counts as nothing.

    Args:
        branches: as judged.
        batch: of factor 1.
    """
    from matplotlib.figure import Figure

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
    axes.set_xlabel("batch size (examples)")
    axes.set_ylabel("progress lost (% of the fall of the loss)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
