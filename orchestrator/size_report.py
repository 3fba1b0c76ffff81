"""What `lowtide size` prints, writes and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cost_models.cluster import ClusterSpec
from cost_models.units import format_bytes, format_seconds
from orchestrator.step_shape import Sized
from planner.report.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = ("workers", "sharding", "micro", "accum", "samples/s", "step", "compute", "remat", "exposed", "optim")
_COLOURS = {"ddp": "#0072B2", "fsdp": "#D55E00", "fsdp_keep": "#009E73"}
_MARKERS = {"ddp": "o", "fsdp": "^", "fsdp_keep": "s"}


def reason(sized: Sized, best: Sized) -> str:
    """Why a shape is not the best: what refuses it, or where it loses most of the time for a sample."""
    if sized.refused:
        return sized.refused
    if sized is best:
        return "the best"
    batch, best_batch = sized.shape.global_batch, best.shape.global_batch
    lost = {
        "compute": sized.compute_s / batch - best.compute_s / best_batch,
        "rematerialization": sized.remat_s / batch - best.remat_s / best_batch,
        "exposed communication": sized.exposed_s / batch - best.exposed_s / best_batch,
        "the optimizer": sized.optimizer_s / batch - best.optimizer_s / best_batch,
    }
    if sized.shape.workers < best.shape.workers:
        return f"{sized.samples_per_s / best.samples_per_s:.0%} of the best, fewer workers"
    worst = max(lost, key=lambda name: lost[name])
    slower = sized.step_s / batch / (best.step_s / best_batch) - 1.0
    if slower <= 0.0:
        return f"more energy than the best, {-slower:.0%} faster"
    return f"{slower:.1%} slower, by {worst}"


def sizing_lines(found: Sequence[Sized], cluster: ClusterSpec, *, budget_bytes: int, rows: int) -> list[str]:
    """The table: the best shapes, then how many are refused and why."""
    fitting = [sized for sized in found if not sized.refused]
    lines = [
        f"{cluster.name}: {cluster.num_nodes} x {cluster.devices_per_node} {cluster.device.name}, "
        f"{format_bytes(budget_bytes)} for each rank; {len(found)} ways, {len(fitting)} fit"
    ]
    if fitting:
        best = fitting[0]
        cells = [
            (
                str(sized.shape.workers),
                sized.shape.sharding,
                str(sized.shape.micro_batch),
                str(sized.shape.accumulation),
                f"{sized.samples_per_s:.4g}",
                *map(
                    format_seconds,
                    (sized.step_s, sized.compute_s, sized.remat_s, sized.exposed_s, sized.optimizer_s),
                ),
                format_bytes(sized.peak_bytes),
                f"{sized.energy_j / sized.shape.global_batch:.3g} J",
                reason(sized, best),
            )
            for sized in fitting[:rows]
        ]
        lines += text_table((*_HEAD, "peak", "a sample", ""), cells)
        if len(fitting) > rows:
            lines.append(f"and {len(fitting) - rows} more that fit; --rows shows them")
    if not fitting and len({sized.refused for sized in found}) == 1:
        return lines  # the one reason is the complaint
    lines += [f"refused: {text}" for text in _refusals(found)]
    return lines


def _refusals(found: Sequence[Sized]) -> list[str]:
    """A line for each reason without a number, and for each sharing how many are too large, and the nearest."""
    lines = []
    by_sharding: dict[str, list[Sized]] = {}
    by_reason: dict[str, list[Sized]] = {}
    for sized in found:
        if sized.refused and sized.peak_bytes:
            by_sharding.setdefault(sized.shape.sharding, []).append(sized)
        elif sized.refused:
            by_reason.setdefault(sized.refused, []).append(sized)
    for why, refused in by_reason.items():
        shardings = dict.fromkeys(sized.shape.sharding for sized in refused)
        lines.append(f"{len(refused)} of {', '.join(shardings)}: {why}")
    for sharding, refused in by_sharding.items():
        nearest = min(refused, key=lambda sized: sized.peak_bytes)
        shape = nearest.shape
        lines.append(
            f"{len(refused)} of {sharding}, such as {shape.workers} workers with micro-batch {shape.micro_batch}: "
            f"{nearest.refused}"
        )
    return lines


def sizing_object(found: Sequence[Sized], cluster: ClusterSpec, *, budget_bytes: int) -> dict[str, Any]:
    """The same, all of it, for ``--json``."""
    best = found[0]
    return {
        "cluster": cluster.name,
        "world_size": cluster.world_size,
        "device": cluster.device.name,
        "budget_bytes": budget_bytes,
        "candidates": [
            {
                **asdict(sized.shape),
                **{key: value for key, value in asdict(sized).items() if key != "shape"},
                "global_batch": sized.shape.global_batch,
                "samples_per_s": sized.samples_per_s,
                "why": reason(sized, best),
            }
            for sized in found
        ],
    }


def sizing_figure(found: Sequence[Sized], cluster: ClusterSpec) -> Figure:
    """Samples a second against workers, one line a sharding, with perfect scaling; and the table as a heat map.

    Args:
        found: as `size_job` gives them.
        cluster: that they were sized for.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    fitting = [sized for sized in found if not sized.refused]
    figure = Figure(figsize=(12.0, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    best: dict[tuple[str, int], float] = {}
    for sized in fitting:
        key = (sized.shape.sharding, sized.shape.workers)
        best[key] = max(best.get(key, 0.0), sized.samples_per_s)
    workers = sorted({count for _, count in best})
    for sharding in sorted({name for name, _ in best}):
        counts = [count for count in workers if (sharding, count) in best]
        left.plot(
            counts,
            [best[sharding, count] for count in counts],
            color=_COLOURS[sharding],
            marker=_MARKERS[sharding],
            label=sharding,
        )
    if workers:
        one = max(rate / count for (_, count), rate in best.items() if count == workers[0])
        left.plot(
            [workers[0], workers[-1]],
            [one * workers[0], one * workers[-1]],
            color="black",
            linestyle=":",
            label="perfect scaling",
        )
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(workers, [str(count) for count in workers])
    left.set_xlabel("workers")
    left.set_ylabel("samples/s")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    left.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}" if rate >= 10 else f"{rate:g}")
    left.yaxis.set_minor_formatter("")
    if workers:
        left.legend(frameon=False)
    table = _heat(found)
    columns = sorted({micro for row in table.values() for micro in row})
    names = list(table)
    grid = np.array([[table[name].get(micro, np.nan) for micro in columns] for name in names], dtype=float)
    shown = right.imshow(grid, aspect="auto", cmap="viridis")
    right.set_xticks(range(len(columns)), [str(micro) for micro in columns])
    right.set_yticks(range(len(names)), names)
    if np.isfinite(grid).any():
        row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
        right.plot(column, row, marker="*", color="white", markeredgecolor="black", markersize=14)
    right.set_xlabel("micro-batch (samples); the star marks the best")
    right.set_ylabel("workers and sharding")
    figure.colorbar(shown, ax=right, label="samples/s (empty: no such division, or it does not fit)")
    return figure


def _heat(found: Sequence[Sized]) -> Mapping[str, Mapping[int, float]]:
    """Workers and sharding -> micro-batch -> samples a second, not a number where it does not fit."""
    rows: dict[str, dict[int, float]] = {}
    for sized in sorted(found, key=lambda s: (s.shape.sharding, s.shape.workers, s.shape.micro_batch)):
        row = rows.setdefault(f"{sized.shape.workers} {sized.shape.sharding}", {})
        rate = max(sized.samples_per_s, row.get(sized.shape.micro_batch, 0.0))
        row[sized.shape.micro_batch] = rate or float("nan")
    return rows
