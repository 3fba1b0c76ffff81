"""Planned steps beside torch's own ways to need less memory, at equal measured peaks: extra time and peak.

    python -m tests.bench.against_torch                            # eight models; an hour or two on two cores
    python -m tests.bench.against_torch gpt2 resnet50 --rounds 9 --out results.json --picture picture.png
    python -m tests.bench.against_torch --draw results.json --picture picture.png

Each alternative (``tests.bench.torch_alternatives``) runs first and its peak is measured; the step is then planned
with that peak as its budget and must measure no more. Plain, the alternative and ours take turns. Extra time is
t / t_plain - 1, t the median processor time of all threads (CUDA: time between events).

Between two methods the difference of a round is (t_ours - t_theirs) / median t_plain. Ours is slower (or faster)
beyond noise where so many rounds say so that a fair coin does with a probability of at most 1 %: in 9 rounds all
of them, in 15 at least 13. The interval printed with the median difference is that of the same sign test.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from planner.inputs.workload import SolverSpec
from planner.report.plots import COLOURS, saved
from planner.report.text_table import text_table
from tests.bench.machine import machine
from tests.bench.torch_alternatives import (
    AMB,
    CHECKPOINT,
    MODELS,
    OURS,
    PLAIN,
    SAME_PEAK,
    bench_of,
    rows_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIOS = (0.8, 0.5, 0.2, 0.0)
# Most probability with which a fair coin may show what is called beyond noise.
COIN = 0.01
MIB = 2**20
# Okabe and Ito's, with the plan's colour of all other figures.
STYLES = {
    PLAIN: ("black", "x"),
    CHECKPOINT: ("#56B4E9", "^"),
    AMB: ("#CC79A7", "s"),
    OURS: (COLOURS["plan"], "o"),
}


def differences(row: Mapping[str, Any]) -> list[float]:
    """(t_ours - t_theirs) / median t_plain of every round."""
    seconds = row["seconds"]
    return [
        (ours - theirs) / row["plain_s"]
        for ours, theirs in zip(seconds[OURS], seconds[row["method"]], strict=True)
    ]


def sign_interval(values: Sequence[float]) -> tuple[float, float]:
    """Interval of the median by the sign test: above 0 where a coin gives as many positive values in <= COIN.

    The k-th smallest and k-th largest of n values, k the most with

        sum_{i < k} C(n, i) / 2^n <= COIN;   the smallest and the largest where there is no such k.

    >>> sign_interval([3.0, 1.0, 2.0, 9.0, 5.0, 4.0, 6.0, 7.0, 8.0])
    (1.0, 9.0)
    """
    ordered, n = sorted(values), len(values)
    k, tail = 0, 0.0
    while k < n // 2 and (tail := tail + math.comb(n, k) / 2**n) <= COIN:
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def verdict(row: Mapping[str, Any]) -> str:
    """Whether ours is slower or faster beyond noise."""
    low, high = sign_interval(differences(row))
    if low > 0.0:
        return "SLOWER"
    return "faster" if high < 0.0 else "as fast"


def difference_words(row: Mapping[str, Any]) -> str:
    """The median difference and its interval."""
    values = differences(row)
    low, high = sign_interval(values)
    return f"{statistics.median(values):+.1%} [{low:+.1%}, {high:+.1%}]"


def deviation(row: Mapping[str, Any], who: str) -> float:
    """Median absolute deviation of a method's seconds, as a share of plain's."""
    taken = row["seconds"][who]
    middle = statistics.median(taken)
    return statistics.median(abs(one - middle) for one in taken) / row["plain_s"]


HEAD = (
    "model",
    "method",
    "peak",
    "ours",
    "extra",
    "MAD",
    "ours",
    "MAD",
    "planned",
    "ours - theirs",
    "ours is",
    "exact",
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    method = f"{row['method']} {row['setting']}".strip()
    peak = f"{row['peak_bytes'] / MIB:.1f} MiB"
    if "extra" not in row:
        reason = "peak of a ratio before" if row.get("same_peak") else f"no plan: {row['failed'][:60]}"
        return (row["model"], method, peak, reason, *[""] * (len(HEAD) - 4))
    different = row["ours_different"]
    return (
        row["model"],
        method,
        peak,
        f"{row['ours_peak_bytes'] / MIB:.1f} MiB" + " !" * (not row["ours_within"]),
        f"{row['extra']:+.1%}",
        f"{deviation(row, row['method']):.1%}",
        f"{row['ours_extra']:+.1%}",
        f"{deviation(row, OURS):.1%}",
        f"{row['ours_planned_extra']:+.1%}",
        difference_words(row),
        verdict(row),
        "yes" if not different else f"NO: {next(iter(different.items()))}",
    )


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The two questions: is ours ever slower, and how much less extra time has it than the partitioner."""
    ran = [row for row in rows if "extra" in row]
    others = [row for row in ran if row["method"] != PLAIN]
    slower = [row for row in others if verdict(row) == "SLOWER"]
    lines = [
        f"{len({row['model'] for row in ran})} models, {len(ran)} cells; no plan in "
        f"{sum('failed' in row for row in rows)}; exact in {sum(not row['ours_different'] for row in ran)}; "
        f"within the budget in {sum(row['ours_within'] for row in ran)}",
        f"beyond noise ours is slower in {len(slower)} of {len(others)} cells, "
        f"faster in {sum(verdict(row) == 'faster' for row in others)}",
        *(
            f"  slower: {row['model']} {row['method']} {row['setting']}: {difference_words(row)}"
            for row in slower
        ),
    ]
    below = [row for row in ran if row["method"] == AMB and row["ratio"] < 1.0]
    front = [row for row in below if not any(_beats(other, row) for other in ran)]
    for what, some in (
        (f"{AMB}, ratios below 1", below),
        (f"  those of them with no other {AMB} cell that is both quicker and smaller", front),
        (f"{AMB}, ratio 1", [row for row in ran if row["method"] == AMB and row["ratio"] == 1.0]),
        *((f"{CHECKPOINT} {one}", [row for row in ran if (row["method"], row["setting"]) == (CHECKPOINT, one)])
          for one in dict.fromkeys(row["setting"] for row in ran if row["method"] == CHECKPOINT)),
        ("plain", [row for row in ran if row["method"] == PLAIN]),
    ):  # fmt: skip
        lines += _means(what, some)
    return [*lines, *_reversals(rows)]


def _means(what: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    theirs = statistics.fmean(row["extra"] for row in rows)
    ours = statistics.fmean(row["ours_extra"] for row in rows)
    # Of next to nothing a share says nothing.
    less = f", {1.0 - ours / theirs:.0%} less" if theirs > 0.01 else ""
    return [f"{what}: {len(rows)} cells, mean extra time {theirs:+.1%}, ours {ours:+.1%}{less}"]


def _beats(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether another ratio of the same model is both quicker and smaller."""
    same = other is not row and other["method"] == AMB and other["model"] == row["model"]
    return same and other["extra"] < row["extra"] and other["peak_bytes"] <= row["peak_bytes"]


def _reversals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How often a lower ratio had the higher peak, of ratios next to each other."""
    pairs, higher = 0, 0
    for model in dict.fromkeys(row["model"] for row in rows):
        tried = sorted(
            (row["ratio"], row["peak_bytes"]) for row in rows if row["model"] == model and "ratio" in row
        )
        for (_, low), (_, high) in itertools.pairwise(tried):
            pairs, higher = pairs + 1, higher + (low > high * (1.0 + SAME_PEAK))
    return (
        [f"a lower ratio had a higher peak than the next one up in {higher} of {pairs} pairs"]
        if pairs
        else []
    )


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Extra time over measured peak, one panel a model.

    Args:
        rows: cells of one run; those without times are left out.

    Returns:
        The figure; memory starts at 0, a ratio of the partitioner stands beside its point.
    """
    from matplotlib.figure import Figure

    ran = [row for row in rows if "extra" in row]
    models = list(dict.fromkeys(row["model"] for row in ran))
    columns = min(4, len(models))
    lines = math.ceil(len(models) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(models) :]:
        axes.set_axis_off()
    for axes, model in zip(panels.flat, models, strict=False):
        _panel(axes, [row for row in ran if row["model"] == model])
        axes.set_title(model, fontsize="medium")
    figure.supxlabel("measured peak (MiB)", fontsize="medium")
    figure.supylabel("extra time (%)", fontsize="medium")
    figure.legend(
        *panels.flat[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=4 if columns > 2 else 2,
        frameon=False,
        fontsize="small",
    )
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.patheffects import withStroke

    for method in (PLAIN, CHECKPOINT, AMB):
        colour, marker = STYLES[method]
        points = [(row["peak_bytes"] / MIB, 100.0 * row["extra"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=method, markersize=5, zorder=3)
    for row in rows:
        if row["method"] == AMB:
            at = (row["peak_bytes"] / MIB, 100.0 * row["extra"])
            axes.annotate(
                row["setting"],
                at,
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="#555555",
                path_effects=[withStroke(linewidth=2, foreground="white")],
                zorder=5,
            )
    ours = sorted((row["ours_peak_bytes"] / MIB, 100.0 * row["ours_extra"]) for row in rows)
    colour, marker = STYLES[OURS]
    axes.plot(
        *zip(*ours, strict=True),
        marker=marker,
        color=colour,
        label=OURS,
        markersize=3.5,
        linewidth=1.2,
        zorder=4,
    )
    axes.set_xlim(0.0, 1.1 * max(row["peak_bytes"] for row in rows) / MIB)
    axes.margins(y=0.1)
    axes.axhline(0.0, color="#BBBBBB", linewidth=0.8, zorder=1)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure the named models, or draw what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, 7 or more to tell noise")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help=f"of {AMB}")
    parser.add_argument("--time-limit", default="20s", help="of each search")
    parser.add_argument("--out", type=Path, help="write all results and the machine here")
    parser.add_argument("--picture", type=Path, help="write the picture here (.png, .pdf or .svg)")
    parser.add_argument("--draw", type=Path, metavar="RESULTS", help="measure nothing, read what --out wrote")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device here", file=sys.stderr)
        return
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"there is no model {unknown[0]!r}. Take of {', '.join(MODELS)}.")
    for path in (options.out, options.picture):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"results need a file in a folder that exists, got {str(path)!r}.")
    failed = False
    if options.draw is not None:
        rows = json.loads(options.draw.read_text())["rows"]
    else:
        rows, failed = _measured(options)
    print("\n".join(["", *text_table(HEAD, [cells(row) for row in rows]), "", *summary(rows)]))
    if options.picture is not None and any("extra" in row for row in rows):
        options.picture.write_bytes(saved(picture(rows), options.picture.suffix.removeprefix(".")))
    sys.exit(int(failed))


def _measured(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """All rows, written after every cell, and whether a model failed, a peak was too high or a result not equal."""
    rows: list[dict[str, Any]] = []
    failed = False
    facts = machine("torch", "torchvision", "timm", "transformers", "highspy")
    facts |= {"threads": torch.get_num_threads(), "device": options.device, "bf16": options.bf16}
    facts |= {"rounds": options.rounds, "time_limit": options.time_limit}
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    for name in options.models or MODELS:
        try:
            # Casts are not kept: a cache that lasts from step to step would belong to no step's peak.
            with (
                torch.autocast(options.device, dtype=torch.bfloat16, cache_enabled=False)
                if options.bf16
                else contextlib.nullcontext()
            ):
                solver = SolverSpec(time_limit=options.time_limit)
                bench = bench_of(name, solver=solver, rounds=options.rounds, device=options.device)
                for row in rows_of(bench, options.ratios):
                    rows.append(row)
                    print("  ".join(cells(row)), file=sys.stderr, flush=True)
                    failed |= not row.get("ours_within", True) or bool(row.get("ours_different"))
                    if options.out is not None:
                        content = {"machine": facts, "rows": rows}
                        options.out.write_text(json.dumps(content, indent=1) + "\n")
        except Exception:  # one model must not end the others
            traceback.print_exc()
            failed = True
    return rows, failed


if __name__ == "__main__":
    main()
