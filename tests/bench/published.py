"""The published baselines over the best known answer, and the published MILP against ours on equal chains.

    python -m tests.bench.published [--instances FOLDER] [--out results.json] [--time-limit 60s]

First table: for each network and baseline the geometric mean over budgets of its time over the least time that
any solver found, beside the figures of Jain et al. (2020). Second table: median seconds of a solve on chains of
nodes of 1 s and 1 byte, runs interleaved; where the MILP proves its optimum the others must have the same, or the
exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cost_models.units import parse_seconds
from tests.bench.machine import INSTANCES, machine
from tests.bench.published_runs import (
    NETWORKS,
    OURS,
    ChainRun,
    budgets_between,
    ratios,
    run_chain,
    run_instance,
    unit_chain,
)

_CHAIN_NODES = (9, 17, 25, 33)
_CHAIN_ROWS = ("checkmate", "chain_dp", "auto")


def ratio_table(rows: list[dict[str, Any]]) -> Table:
    """One line per row, one column per network."""
    table = Table(title="time over the least time found, budgets answered (paper)")
    instances = list(dict.fromkeys(row["instance"] for row in rows))
    table.add_column("")
    for instance in instances:
        table.add_column(instance, justify="right", no_wrap=True)
    for name in dict.fromkeys(row["row"] for row in rows):
        cells = []
        for row in (row for row in rows if row["row"] == name):
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.4f}"
            share = f"{row['answered']}/{row['answerable']}"
            cells.append(f"{ratio} {share} ({row['paper']})")
        table.add_row(name, *cells)
    return table


def chain_table(runs: list[ChainRun]) -> Table:
    """One line per chain and budget."""
    table = Table(title="chains of equal nodes: median solve (status), time of the step")
    for name in ("nodes", "budget", *_CHAIN_ROWS, "MILP / chain_dp", "MILP / auto"):
        table.add_column(name, justify="right")
    for run in runs:
        cells = [
            f"{1e3 * run.median_s(row):.2f} ms ({run.statuses[row][0]}), {run.times_s[row][0]:.0f} s"
            for row in _CHAIN_ROWS
        ]
        bound = "" if run.finished("checkmate") else ">"
        for row in _CHAIN_ROWS[1:]:
            factor = run.median_s("checkmate") / run.median_s(row)
            cells.append(f"{bound}{factor:.0f}x" if math.isfinite(run.times_s[row][0]) else "-")
        table.add_row(str(run.num_nodes), str(run.budget_bytes), *cells)
    return table


def main() -> None:
    """Run both tables, print them, and write them where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=Path, default=INSTANCES)
    parser.add_argument(
        "--only", nargs="*", default=list(NETWORKS), help="names of instances; none: chains only"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--time-limit", type=parse_seconds, default=60.0, help="of one solve, such as 60s")
    parser.add_argument("--num-budgets", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="of each solve of a chain")
    parser.add_argument("--no-chains", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    console, log = Console(width=140), Console(stderr=True)
    limit = {"time_limit_s": options.time_limit, "threads": options.threads}
    runs: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name in options.only:
        path = options.instances / f"{name}.json"
        if not path.is_file():
            skipped[name] = f"there is no file {path.name} in the folder of instances"
            log.print(f"skipped {name}: {skipped[name]}")
            continue
        log.print(f"{name} ...")
        runs += run_instance(path, num_budgets=options.num_budgets, **limit)
    chains: list[ChainRun] = []
    for num_nodes in () if options.no_chains else _CHAIN_NODES:
        for budget in budgets_between(unit_chain(num_nodes), 3)[::2]:
            log.print(f"chain of {num_nodes} nodes in {budget} bytes ...")
            chains.append(run_chain(num_nodes, budget, rows=_CHAIN_ROWS, repeats=options.repeats, **limit))
    table = ratios(runs)
    if table:
        console.print(ratio_table(table))
    if chains:
        console.print(chain_table(chains))
    if options.out:
        result = {
            "about": __doc__.splitlines()[0] if __doc__ else "",
            "time_limit_s": options.time_limit,
            "solvers": OURS,
            "skipped": skipped,
            "ratios": table,
            "runs": runs,
            "chains": [{**asdict(run), "same_optimum": run.same_optimum()} for run in chains],
            **machine("pulp", "highspy", "numpy"),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    wrong = [f"{run.num_nodes} nodes in {run.budget_bytes} bytes" for run in chains if not run.same_optimum()]
    if wrong:
        sys.exit(f"another time than the proven optimum of the published MILP: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
