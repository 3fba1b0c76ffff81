"""The picture of `large_batch.py`: steps to the target against batch size, with the line of perfect scaling."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

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

    Args:
        rows: of `large_batch.table`.
    """
    tasks = sorted({row["task"] for row in rows}, reverse=True)
    drawn = Figure(figsize=(5.2 * len(tasks), 4.2), layout="constrained")
    for place, task in enumerate(tasks, start=1):
        axes = drawn.add_subplot(1, len(tasks), place)
        cells = [row for row in rows if row["task"] == task and row["median_steps"]]
        for optimizer, colour in COLOURS.items():
            own = sorted(
                (row for row in cells if row["optimizer"] == optimizer), key=lambda row: row["batch"]
            )
            if not own:
                continue
            batches, medians = [row["batch"] for row in own], [row["median_steps"] for row in own]
            reached = [[steps for steps in row["steps"] if steps is not None] for row in own]
            below = [median - min(steps) for median, steps in zip(medians, reached)]
            above = [max(steps) - median for median, steps in zip(medians, reached)]
            axes.errorbar(
                batches,
                medians,
                yerr=[below, above],
                color=colour,
                label=optimizer,
                marker="o",
                ms=3,
                lw=1.2,
                capsize=2,
            )
        if cells:
            first = min(row["batch"] for row in cells)
            least = min(row["median_steps"] for row in cells if row["batch"] == first)
            last = max(row["batch"] for row in cells)
            axes.plot(
                [first, last],
                [least, least * first / last],
                ls="--",
                color="#666666",
                label="perfect scaling",
            )
            axes.set_ylim(bottom=min(row["median_steps"] for row in cells) * 0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"batch size (samples), {task}")
        axes.set_ylabel("steps to the training loss")
        axes.legend(fontsize=7)
    return drawn
