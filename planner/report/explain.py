"""What a plan retains and rematerializes, layer by layer, and which layers own its peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cost_models.units import format_bytes, format_seconds
from planner.plan_file import Plan
from planner.report.replayed import STATIC, WORKSPACE, Replayed
from planner.report.text_table import text_table
from planner.residency import Holder, holders

_MAX_HOLDERS = 8


@dataclass(frozen=True)
class LayerRow:
    """One layer's part of a plan.

    Attributes:
        layer: qualified name, rolled up.
        retained_bytes: made in forward (or by the loss), and there when backward begins.
        num_retained: values of these bytes.
        rematerialized_bytes: made by second runs.
        num_rematerialized: second runs.
        rematerialized_s: seconds of the second runs.
        time_s: seconds of the first runs, forward and backward.
        peak_bytes: there when the step peaks.
    """

    layer: str
    retained_bytes: int = 0
    num_retained: int = 0
    rematerialized_bytes: int = 0
    num_rematerialized: int = 0
    rematerialized_s: float = 0.0
    time_s: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Explanation:
    """A plan, layer by layer.

    Attributes:
        rows: in the order in which the layers first run.
        owners: (what, bytes) at the peak, the largest first: layers, static memory, workspace.
        peak_bytes: of the plan.
        peak_owner: what runs then, in words.
        holders: the largest single values that are there then.
    """

    rows: tuple[LayerRow, ...]
    owners: tuple[tuple[str, int], ...]
    peak_bytes: int
    peak_owner: str
    holders: tuple[Holder, ...]

    def to_object(self) -> dict[str, Any]:
        """The explanation for ``--json``."""
        return {
            "layers": [dataclasses.asdict(row) for row in self.rows],
            "peak_bytes": self.peak_bytes,
            "peak_owner": self.peak_owner,
            "peak_owners": [{"owner": owner, "size_bytes": size} for owner, size in self.owners],
            "peak_values": [dataclasses.asdict(holder) for holder in self.holders],
        }


def explain(plan: Plan, *, depth: int | None = None) -> Explanation:
    """Explain a plan from its file alone.

    Args:
        plan: of format 2.
        depth: parts of a layer's qualified name that are kept; None for as many as give a short table.

    Returns:
        Rows, and the owners of the peak; their bytes sum to it.

    Raises:
        ValueError: the plan has no table, or contradicts it.
    """
    if depth is not None and depth < 1:
        raise ValueError(f"--depth must be 1 or more, got {depth}. Leave it out for a short table.")
    replayed = Replayed.of(plan)
    graph, time_s = replayed.costed.graph, replayed.costed.time_s
    group = replayed.groups(depth)
    sums: dict[str, dict[str, Any]] = {}
    for layer in dict.fromkeys(group):
        sums[layer] = dataclasses.asdict(LayerRow(layer))
    ran: set[int] = set()
    for k in replayed.schedule.node_order:
        row = sums[group[k]]
        if k in ran:
            made = (graph.values[v] for v in graph.nodes[k].outputs)
            row["rematerialized_bytes"] += sum(v.size_bytes for v in made if not v.first_run_only)
            row["num_rematerialized"] += 1
            row["rematerialized_s"] += time_s[k]
        else:
            row["time_s"] += time_s[k]
        ran.add(k)
    begins, peaks = replayed.backward_begins, replayed.peak_computation
    at_optimizer = plan.peak_owner == "optimizer step"
    for stay in replayed.stays:
        value = graph.values[stay.value]
        row = sums[group[value.node]]
        if stay.first < begins < stay.stop and value.size_bytes:
            row["retained_bytes"] += value.size_bytes
            row["num_retained"] += 1
        if stay.first <= peaks < stay.stop and not at_optimizer:
            row["peak_bytes"] += value.size_bytes
    rows = tuple(LayerRow(**row) for row in sums.values())
    trace = dataclasses.replace(replayed.trace, peak_bytes=plan.predicted_peak_bytes)
    largest = holders(replayed.problem, replayed.schedule, trace)
    return Explanation(
        rows=rows,
        owners=_owners(rows, replayed, at_optimizer=at_optimizer),
        peak_bytes=plan.predicted_peak_bytes,
        peak_owner=plan.peak_owner,
        holders=tuple(one for one in largest if one.name != STATIC)[:_MAX_HOLDERS],
    )


def _owners(
    rows: Sequence[LayerRow], replayed: Replayed, *, at_optimizer: bool
) -> tuple[tuple[str, int], ...]:
    plan = replayed.plan
    if at_optimizer:
        return (("optimizer step", plan.predicted_peak_bytes),)
    node = replayed.schedule.node_order[replayed.peak_computation]
    owners = [(row.layer, row.peak_bytes) for row in rows]
    owners += [(STATIC, plan.static_bytes), (WORKSPACE, replayed.costed.graph.nodes[node].workspace_bytes)]
    return tuple(sorted((one for one in owners if one[1]), key=lambda one: -one[1]))


def explanation_lines(explanation: Explanation) -> list[str]:
    """The explanation as a table for people."""
    head = ("layer", "retained", "made again", "seconds again", "of its seconds", "at the peak")
    table: list[tuple[str, ...]] = []
    for row in (*explanation.rows, _total(explanation.rows)):
        share = row.rematerialized_s / row.time_s if row.time_s else 0.0
        table.append(
            (
                row.layer,
                f"{format_bytes(row.retained_bytes)} ({row.num_retained})",
                f"{format_bytes(row.rematerialized_bytes)} ({row.num_rematerialized})",
                format_seconds(row.rematerialized_s),
                f"{share:.1%}",
                format_bytes(row.peak_bytes),
            )
        )
    lines = text_table(head, table)
    lines += ["", f"peak {format_bytes(explanation.peak_bytes)} at {explanation.peak_owner}, held by"]
    lines += [f"  {format_bytes(size):>12}  {owner}" for owner, size in explanation.owners[:_MAX_HOLDERS]]
    if len(explanation.owners) > _MAX_HOLDERS:
        rest = sum(size for _, size in explanation.owners[_MAX_HOLDERS:])
        lines.append(f"  {format_bytes(rest):>12}  other")
    lines += ["largest values there"]
    for one in explanation.holders:
        layer = f" of {one.layer}" if one.layer else ""
        lines.append(f"  {format_bytes(one.size_bytes):>12}  {one.name} ({one.op}){layer}")
    return lines


def _total(rows: Sequence[LayerRow]) -> LayerRow:
    keys = [field.name for field in dataclasses.fields(LayerRow) if field.name != "layer"]
    return LayerRow("all", **{key: sum(getattr(row, key) for row in rows) for key in keys})
