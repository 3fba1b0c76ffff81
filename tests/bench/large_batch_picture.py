"""The picture of `large_batch.py`: steps to the target against batch size, with the line of perfect scaling."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

# Okabe and Ito's colours, one fixed per optimizer.
COLOURS = {
    "sgd": "#000000",
    "adamw": "#E69F00",
    "lars": "#56B4E9",
    "lamb": "#009E73",
    "ranger": "#CC79A7",
    "ranger_lars direction": "#D55E00",
    "ranger_lars before_rectify": "#0072B2",
    "ranger_lars over9000": "#999999",
}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Median steps over the seeds; a bar from the least to the most of them.

    The optimizers stand side by side at each batch size, so that their bars can be told apart.

    Args:
        rows: of `large_batch.table`.
    """
    tasks = sorted({row["task"] for row in rows}, reverse=True)
    drawn = Figure(figsize=(5.0 * len(tasks) + 2.0, 4.4), layout="constrained")
    shown: dict[str, Any] = {}
    for place, task in enumerate(tasks, start=1):
        axes = drawn.add_subplot(1, len(tasks), place)
        cells = [row for row in rows if row["task"] == task and row["median_steps"]]
        for number, (optimizer, colour) in enumerate(COLOURS.items()):
            own = sorted(
                (row for row in cells if row["optimizer"] == optimizer), key=lambda row: row["batch"]
            )
            if not own:
                continue
            batches, medians = [row["batch"] for row in own], [row["median_steps"] for row in own]
            reached = [[steps for steps in row["steps"] if steps is not None] for row in own]
            below = [median - min(steps) for median, steps in zip(medians, reached)]
            above = [max(steps) - median for median, steps in zip(medians, reached)]
            shift = 2 ** (0.06 * (number - (len(COLOURS) - 1) / 2))
            shown[optimizer] = axes.errorbar(
                [batch * shift for batch in batches],
                medians,
                yerr=[below, above],
                color=colour,
                marker="o",
                ms=3,
                lw=1.2,
                capsize=2,
            )
        if cells:
            first = min(row["batch"] for row in cells)
            least = min(row["median_steps"] for row in cells if row["batch"] == first)
            last = max(row["batch"] for row in cells)
            (shown["perfect scaling"],) = axes.plot(
                [first, last], [least, least * first / last], ls="--", color="#666666"
            )
            axes.set_ylim(bottom=min(row["median_steps"] for row in cells) * 0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["batch"] for row in cells})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", lw=0.4, color="#DDDDDD")
        axes.set_xlabel(f"batch size (samples), {task}")
        axes.set_ylabel("steps to the training loss")
    drawn.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=8)
    return drawn
