"""How well the roofline prices what was measured: a table by kind of operation, and a figure with the outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cost_models.measured import FittedRoofline
from cost_models.measurements import MeasuredOperation, Measurements
from cost_models.roofline import Roofline
from planner.report.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED_OUTLIERS = 6
_EVERYTHING = "all"


@dataclass(frozen=True)
class KindOfOperation:
    """The operations of one kind.

    Attributes:
        kind: as for `Work`.
        num_operations: that were measured.
        share: of the time of all of them, each once.
        before: median factor by which the roofline is off, at least 1.
        after: the same for the roofline fitted to all operations but the one that is priced.
        within_2x: share of the operations that the fitted roofline prices within a factor of 2.
    """

    kind: str
    num_operations: int
    share: float
    before: float
    after: float
    within_2x: float


def by_kind(measurements: Measurements, roofline: Roofline) -> list[KindOfOperation]:
    """Kinds by falling share of the time, then all operations together."""
    every = tuple(measurements.operations.values())
    fitted = FittedRoofline(roofline, every)
    before = {id(o): _factor(roofline.time_s(o.work), o) for o in every}
    after = {id(o): _factor(fitted.without(o).time_s(o.work), o) for o in every}
    total_s = sum(o.time_s for o in every)
    groups: dict[str, list[MeasuredOperation]] = {}
    for operation in every:
        groups.setdefault(operation.kind, []).append(operation)
    rows = [
        KindOfOperation(
            kind=kind,
            num_operations=len(group),
            share=sum(o.time_s for o in group) / total_s,
            before=statistics.median(before[id(o)] for o in group),
            after=statistics.median(after[id(o)] for o in group),
            within_2x=sum(after[id(o)] <= 2.0 for o in group) / len(group),
        )
        for kind, group in {**groups, _EVERYTHING: list(every)}.items()
        if group
    ]
    return sorted(rows, key=lambda row: (row.kind == _EVERYTHING, -row.share))


def _factor(guess_s: float, operation: MeasuredOperation) -> float:
    """By what factor a guess is off, at least 1."""
    return max(guess_s, operation.time_s) / max(min(guess_s, operation.time_s), 1e-12)


def calibration_lines(
    measurements: Measurements, roofline: Roofline, failed: Mapping[str, str], *, place: str
) -> list[str]:
    """What `lowtide calibrate` prints.

    Args:
        measurements: of this machine.
        roofline: of the device, before.
        failed: line of an operation that does not run alone -> why.
        place: where the measurements were written.
    """
    head = ("kind", "operations", "of the time", "roofline off by", "fitted off by", "within 2x")
    kinds = by_kind(measurements, roofline)
    rows = [
        (
            row.kind,
            str(row.num_operations),
            f"{row.share:.0%}",
            f"{row.before:.2f}x",
            f"{row.after:.2f}x",
            f"{row.within_2x:.0%}",
        )
        for row in kinds
    ]
    worse = [row.kind for row in kinds if row.after > row.before]
    setting = measurements.setting
    lines = [
        f"measured on {setting.device}, torch {setting.torch_version}, {setting.threads} threads in each of "
        f"{setting.processes} processes",
        *text_table(head, rows),
        f"a call takes {measurements.overhead_s * 1e6:.0f} µs beyond its operation",
        "fitted: to all operations but the one that is priced, as those that were not measured are",
    ]
    if worse:
        lines.append(
            f"fitted is further off than the roofline itself for {', '.join(worse)}: give `lowtide calibrate` "
            "every job that is to be planned, so that its own operations are measured"
        )
    if failed:
        lines.append(f"{len(failed)} operations do not run alone and are priced so, among them:")
        lines += [f"  {line[:90]}: {why[:90]}" for line, why in list(failed.items())[:3]]
    lines.append(f"written to {place}")
    return lines


def calibration_object(
    measurements: Measurements, roofline: Roofline, failed: Mapping[str, str], *, place: str
) -> dict[str, Any]:
    """The same for ``--json``."""
    return {
        "file": place,
        "setting": measurements.setting.model_dump(),
        "num_operations": len(measurements.operations),
        "overhead_s": measurements.overhead_s,
        "kinds": [vars(row) for row in by_kind(measurements, roofline)],
        "failed": dict(failed),
    }


def calibration_figure(measurements: Measurements, roofline: Roofline) -> Figure:
    """The roofline's time of each operation against the measured one, both logarithmic, the worst ones named.

    Args:
        measurements: of this machine.
        roofline: of the device, before.

    Returns:
        The figure; on the solid line both are equal, between the dotted ones they are within a factor of 2.
    """
    from matplotlib.figure import Figure

    every = {line: (o, roofline.time_s(o.work)) for line, o in measurements.operations.items()}
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    axes = figure.add_subplot()
    kinds = sorted({o.kind for o, _ in every.values()})
    for at, kind in enumerate(kinds):
        pairs = [(o.time_s * 1e3, guess_s * 1e3) for o, guess_s in every.values() if o.kind == kind]
        colour, marker = _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]
        axes.scatter(
            [x for x, _ in pairs], [y for _, y in pairs], s=16, c=colour, marker=marker, label=kind, alpha=0.8
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    low = min(min(o.time_s, guess_s) for o, guess_s in every.values()) * 1e3 / 2
    high = max(max(o.time_s, guess_s) for o, guess_s in every.values()) * 1e3 * 2
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    for factor in (0.5, 2.0):
        axes.plot([low, high], [factor * low, factor * high], color="black", linewidth=0.8, linestyle=":")
    for line, operation, guess_s in _outliers(every):
        axes.annotate(
            line,
            (operation.time_s * 1e3, guess_s * 1e3),
            xytext=(6, -3),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("measured (ms)")
    axes.set_ylabel("roofline (ms)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _outliers(
    every: Mapping[str, tuple[MeasuredOperation, float]],
) -> Sequence[tuple[str, MeasuredOperation, float]]:
    """The operations whose mispricing weighs most: seconds times how far off; one of each operator."""

    def weight(pair: tuple[MeasuredOperation, float]) -> float:
        operation, guess_s = pair
        return operation.time_s * abs(math.log(max(guess_s, 1e-12) / operation.time_s))

    named: dict[str, tuple[str, MeasuredOperation, float]] = {}
    for line, (operation, guess_s) in sorted(every.items(), key=lambda item: -weight(item[1])):
        if _factor(guess_s, operation) > 2.0:
            operator = line.removeprefix("in-place ").partition(" ")[0]
            name = operator.removeprefix("aten.").removesuffix(".default")
            named.setdefault(operator, (name, operation, guess_s))
    return list(named.values())[:_NAMED_OUTLIERS]
