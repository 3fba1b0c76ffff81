"""The planner on the published cost graphs, beside the figures to reach: extra time in per cent of the step.

    python -m tests.bench.instances [--instances FOLDER] [--only rl500] [--out results.json]

One process at a time, `auto` with nothing left unproven on purpose (gap 0) and the asked time limit; it ends
earlier where it proves its answer or finds nothing better for long.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from planner.bare_graph import read_bare_graph
from planner.problem import Problem
from planner.simulate import simulate
from planner.solvers.auto import Auto
from planner.solvers.retain_all import retain_all_schedule
from tests.bench.machine import INSTANCES, machine


@dataclass(frozen=True)
class Case:
    """One instance, budget and time limit, with the extra time to reach in per cent."""

    name: str
    share: float
    free_order: bool
    time_limit_s: float
    reach: float


@dataclass(frozen=True)
class Row:
    """What was measured for one case; per cent of the step with everything retained."""

    case: Case
    extra: float
    bound: float
    status: str
    solver: str
    solve_s: float


CASES = (
    Case("rl100", 0.9, False, 10, 0.79),
    Case("rl100", 0.8, False, 10, 2.30),
    Case("rl250", 0.9, False, 120, 0.91),
    Case("rl250", 0.8, False, 120, 4.60),
    Case("rl500", 0.9, False, 300, 0.70),
    Case("rl500", 0.8, False, 300, 3.39),
    Case("rl100", 0.8, True, 60, 0.3),
    Case("rl250", 0.8, True, 60, 0.1),
    Case("rl500", 0.8, True, 60, 2.3),
    Case("u-net", 0.8, False, 60, 1.99),
    Case("mobilenet", 0.8, False, 60, 0.38),
    Case("resnet50", 0.8, False, 60, 0.28),
    Case("resnet50", 0.5, False, 60, 1.51),
    Case("resnet50", 0.3, False, 60, 4.2),
)


def run(case: Case, folder: Path) -> Row:
    """Solve one case; the judge has replayed the answer."""
    costed = read_bare_graph(folder / f"{case.name}.json")
    everything = Problem(costed, 0)
    peak = simulate(everything, retain_all_schedule(everything)).peak_bytes
    problem = Problem(costed, int(case.share * peak))
    solution = Auto(time_limit_s=case.time_limit_s, gap=0.0, free_order=case.free_order).solve(problem)
    extra = float("inf")
    if solution.schedule is not None:
        trace = simulate(problem, solution.schedule)
        if trace.peak_bytes > problem.budget_bytes:
            sys.exit(f"{case}: the judge finds {trace.peak_bytes} B")
        extra = 100.0 * (trace.time_s / costed.step_s - 1.0)
    return Row(
        case,
        extra,
        100.0 * max(0.0, solution.bound_s / costed.step_s - 1.0),
        solution.status.value,
        solution.solver,
        solution.solve_s,
    )


def table_of(rows: list[Row]) -> Table:
    """One line per case."""
    table = Table(title="extra time in % of the step with everything retained")
    for name in ("instance", "budget", "order", "reach", "extra", "bound", "status", "solver", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        case = row.case
        table.add_row(
            case.name,
            f"{case.share:.0%}",
            "free" if case.free_order else "given",
            f"{case.reach:g} in {case.time_limit_s:g} s",
            f"{row.extra:.4f}",
            f"{row.bound:.4f}",
            row.status,
            row.solver,
            f"{row.solve_s:.1f}",
        )
    return table


def main() -> None:
    """Solve every case, print the table, write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=Path, default=INSTANCES)
    parser.add_argument("--only", action="append", help="name of an instance; may be given again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.instances.is_dir():
        print(f"skipped: there is no folder {options.instances}")
        return
    rows: list[Row] = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        rows.append(run(case, options.instances))
        print(
            f"{case.name} {case.share:.0%}: {rows[-1].extra:.4f} in {rows[-1].solve_s:.1f} s", file=sys.stderr
        )
    Console(width=120).print(table_of(rows))
    if options.out is not None:
        answer = {**machine("highspy", "pulp", "numpy"), "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
