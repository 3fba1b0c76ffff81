"""Runs behind the tables of `tests.bench.published`: baselines on instances, and chains of equal nodes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.bare_graph import read_bare_graph
from planner.costed import CostedGraph
from planner.graph import Graph, Phase, Value
from planner.just_in_time import schedule_of_order
from planner.problem import Problem
from planner.simulate import simulate
from planner.solution import Status
from planner.solvers import solver_named, solver_names
from planner.solvers.bounds import least_need_bytes
from tests.graphs import chain, node, priced, problem

NETWORKS = ("mobilenet", "vgg16", "u-net", "resnet50")
# Row -> solver, its options, and what the paper (Jain et al., 2020) reports over its networks.
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "Checkmate, LP rounding": ("checkmate", {"rounding": True}),
    "Chen sqrt(n)": ("chen_sqrt", {}),
    "Chen sqrt(n), linearized": ("chen_sqrt", {"linearized": True}),
    "Chen greedy": ("chen_greedy", {}),
    "Chen greedy, linearized": ("chen_greedy", {"linearized": True}),
    "Griewank (REVOLVE)": ("griewank", {}),
}
OURS = tuple(name for name in ("chain_dp", "materialization", "staged", "auto") if name in solver_names())
_ROUNDING_PAPER = {"mobilenet": "1.06", "vgg16": "1.01", "u-net": "1.03", "resnet50": "1.05"}
_RANGES_PAPER = {"Chen sqrt(n)": "1.14-1.54", "Chen greedy": "1.06-1.39", "Griewank (REVOLVE)": "1.44-7.07"}
# Optima found by different solvers agree to this share; HiGHS stops within it.
_SAME = 1e-6


def paper_figure(baseline: str, instance: str) -> str:
    """The paper's ratio over its optimum: of the network for the rounding, a range over all networks otherwise."""
    if baseline == "Checkmate, LP rounding":
        return _ROUNDING_PAPER[instance]
    return _RANGES_PAPER.get(baseline.removesuffix(", linearized"), "-")


def budgets_between(costed: CostedGraph, count: int) -> list[int]:
    """Budgets in equal steps between what the largest node needs and the retained-all peak, both left out."""
    nothing = Problem(costed, 0)
    order = range(len(costed.graph.nodes))
    top = simulate(nothing, schedule_of_order(costed.graph, order)).peak_bytes
    low = least_need_bytes(nothing)
    return [low + (top - low) * step // (count + 1) for step in range(count, 0, -1)]


def run_instance(path: Path, *, time_limit_s: float, num_budgets: int, threads: int) -> list[dict[str, Any]]:
    """Every solver at every budget of one instance.

    Args:
        path: of a bare graph.
        time_limit_s: of one solve.
        num_budgets: see `budgets_between`.
        threads: of the MILP solvers.

    Returns:
        One object per solve: instance, row, budget_bytes, status, time_share (of the retained-all step; None
        without a schedule), solve_s.
    """
    costed = read_bare_graph(path)
    rows = {**BASELINES, **{name: (name, {}) for name in OURS}}
    runs = []
    for budget in budgets_between(costed, num_budgets):
        asked = Problem(costed, budget)
        for row, (name, options) in rows.items():
            solver = solver_named(name, time_limit_s=time_limit_s, gap=0.0, threads=threads, **options)
            solution = solver.solve(asked)
            if solution.schedule is not None:
                assert simulate(asked, solution.schedule).peak_bytes <= budget
            runs.append(
                {
                    "instance": path.stem,
                    "row": row,
                    "budget_bytes": budget,
                    "status": solution.status.value,
                    "time_share": solution.time_s / costed.step_s if solution.schedule else None,
                    "solve_s": solution.solve_s,
                }
            )
    return runs


def ratios(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean, over the budgets that a row answers, of its time over the least time of all rows."""
    best: dict[tuple[str, int], float] = {}
    for run in runs:
        if run["time_share"] is not None:
            key = run["instance"], run["budget_bytes"]
            best[key] = min(best.get(key, math.inf), run["time_share"])
    table = []
    for instance, row in dict.fromkeys((run["instance"], run["row"]) for run in runs):
        mine = [run for run in runs if (run["instance"], run["row"]) == (instance, row)]
        logs = [
            math.log(run["time_share"] / best[instance, run["budget_bytes"]])
            for run in mine
            if run["time_share"] is not None
        ]
        table.append(
            {
                "instance": instance,
                "row": row,
                "ratio": math.exp(statistics.fmean(logs)) if logs else None,
                "answered": len(logs),
                "answerable": sum((instance, run["budget_bytes"]) in best for run in mine),
                "paper": paper_figure(row, instance) if row in BASELINES else "1",
                "median_solve_s": statistics.median(run["solve_s"] for run in mine),
            }
        )
    return table


def unit_chain(num_nodes: int) -> CostedGraph:
    """Forward nodes, a loss, and as many backward nodes; every node costs 1 s and makes 1 byte.

    Args:
        num_nodes: odd; (num_nodes - 1) / 2 are forward.
    """
    length = (num_nodes - 1) // 2
    plain = chain((1,) * length)
    nodes = list(plain.nodes[:length])
    nodes.append(node("loss", Phase.LOSS, [length - 1], [length]))
    for step, one in enumerate(plain.nodes[length:]):
        # The gradient of the node after it is one place later; the first reads that of the loss.
        reads = [v for v in one.inputs if v < length] + [length + step]
        nodes.append(node(one.name, Phase.BACKWARD, reads, [length + step + 1]))
    values = (
        *plain.values[:length],
        Value("loss", 1, length),
        *(Value(v.name, v.size_bytes, v.node + 1, v.kind) for v in plain.values[length:]),
    )
    return priced(Graph(tuple(nodes), values))


@dataclass
class ChainRun:
    """Both solvers on one chain at one budget.

    Attributes:
        num_nodes: of the chain.
        budget_bytes: one byte per value.
        times_s: row -> the step's time in each repetition.
        statuses: row -> status in each repetition.
        solve_s: row -> wall-clock seconds of each repetition.
    """

    num_nodes: int
    budget_bytes: int
    times_s: dict[str, list[float]] = field(default_factory=dict)
    statuses: dict[str, list[str]] = field(default_factory=dict)
    solve_s: dict[str, list[float]] = field(default_factory=dict)

    def median_s(self, row: str) -> float:
        """Median seconds of a solve."""
        return statistics.median(self.solve_s[row])

    def finished(self, row: str) -> bool:
        """Proven optimal every time."""
        return all(status == Status.OPTIMAL.value for status in self.statuses[row])

    def same_optimum(self) -> bool:
        """Whenever the published MILP proves its optimum, every other row has the same time."""
        published = self.times_s["checkmate"]
        return not self.finished("checkmate") or all(
            abs(time_s - published[0]) <= _SAME * published[0]
            for row_times in self.times_s.values()
            for time_s in row_times
        )


def run_chain(
    num_nodes: int, budget_bytes: int, *, rows: Sequence[str], repeats: int, time_limit_s: float, threads: int
) -> ChainRun:
    """Solve one chain with every row in turn, repeated.

    Args:
        num_nodes: of the chain.
        budget_bytes: one byte per value.
        rows: solvers, `checkmate` among them.
        repeats: rounds; one is enough for a row that took more than a tenth of the limit.
        time_limit_s: of one solve.
        threads: of the MILP solvers.
    """
    asked = problem(unit_chain(num_nodes), budget_bytes)
    done = ChainRun(num_nodes, budget_bytes)
    for _ in range(repeats):
        for row in rows:
            if row in done.solve_s and done.solve_s[row][0] > time_limit_s / 10:
                continue
            solver = solver_named(row, time_limit_s=time_limit_s, gap=0.0, threads=threads)
            solution = solver.solve(asked)
            done.times_s.setdefault(row, []).append(solution.time_s)
            done.statuses.setdefault(row, []).append(solution.status.value)
            done.solve_s.setdefault(row, []).append(solution.solve_s)
    return done
