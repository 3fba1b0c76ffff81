"""How time and memory of the planner grow with the graph: seconds to the answer, gap, resident bytes.

    python -m tests.bench.scaling [--out results.json] [--time-limit 60]

Two families: random layered graphs (layers of random width, edges mostly from the layer before, as in the appendix
of Gagrani et al., 2022, whose generator is not published) at 85 % in the given order, and Llama of more and more
layers, captured, at 60 %. Every case runs in a process of its own; its memory is the peak resident size beyond that
when the graph was there.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cost_models.work import Work
from planner.costed import CostedGraph
from planner.graph import Graph, Node, Phase, Value
from planner.problem import Problem
from planner.simulate import simulate
from planner.solvers.auto import Auto
from planner.solvers.retain_all import retain_all_schedule
from tests.bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
LAYERED = (100, 250, 500, 1000, 2000)
LLAMA = (4, 8, 16, 32, 64)
_NO_WORK = Work(flop=0.0, read_bytes=0, written_bytes=0, dtype="float32", kind="elementwise")


def layered(num_nodes: int, *, seed: int = 0) -> CostedGraph:
    """A random layered graph; costs and bytes are uniform whole numbers up to 1,000 and 5,000."""
    rng = random.Random(seed)
    layers: list[list[int]] = [[0]]
    while sum(map(len, layers)) < num_nodes - 1:
        first = sum(map(len, layers))
        width = min(rng.randint(2, max(3, round(num_nodes**0.5))), num_nodes - 1 - first)
        layers.append(list(range(first, first + width)))
    layers.append([num_nodes - 1])
    inputs: list[set[int]] = [set() for _ in range(num_nodes)]
    read: set[int] = set()
    for depth, layer in enumerate(layers[1:], start=1):
        for node in layer:
            for _ in range(rng.randint(1, 4)):
                back = 1 if rng.random() < 0.8 else rng.randint(1, depth)
                inputs[node].add(rng.choice(layers[depth - back]))
            read |= inputs[node]
        # Nothing is computed in vain.
        for node in set(layers[depth - 1]) - read:
            inputs[rng.choice(layer)].add(node)
    nodes = tuple(
        Node(str(k), "graph.node", Phase.FORWARD, tuple(sorted(row)), (k,), _NO_WORK)
        for k, row in enumerate(inputs)
    )
    values = tuple(Value(str(k), 10 * rng.randint(1, 500), k) for k in range(num_nodes))
    return CostedGraph(Graph(nodes, values), tuple(float(rng.randint(1, 1000)) for _ in range(num_nodes)))


def measure(family: str, size: int, time_limit_s: float) -> dict[str, Any]:
    """One case."""
    if family == "layered":
        problem, share, options = Problem(layered(size), 0), 0.85, {"gap": 0.005}
    else:
        from tests.bench.captured import problem_of

        problem, share, options = problem_of("llama-32", layers=size), 0.6, {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = simulate(problem, retain_all_schedule(problem)).peak_bytes
    asked = Problem(problem.costed, int(share * peak), problem.static)
    begin = time.perf_counter()
    solution = Auto(time_limit_s=time_limit_s, **options).solve(asked)
    seconds = time.perf_counter() - begin
    return {
        "family": family,
        "size": size,
        "nodes": len(problem.costed.graph.nodes),
        "share": share,
        "seconds": seconds,
        "solver": solution.solver,
        "status": solution.status.value,
        "extra": solution.time_s / problem.costed.step_s - 1.0 if solution.schedule is not None else None,
        "gap": solution.gap if solution.schedule is not None else None,
        "solving_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def main() -> None:
    """Measure every case, print the table, write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-limit", type=float, default=180.0, help="seconds of one search")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("FAMILY", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]), options.time_limit)))
        return
    rows: list[dict[str, Any]] = []
    for family, sizes in (("layered", LAYERED), ("llama", LLAMA)):
        for size in sizes:
            command = [sys.executable, "-m", "tests.bench.scaling", "--measure", family, str(size)]
            command += ["--time-limit", str(options.time_limit)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(
                    f"{family} {size} was left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr
                )
                continue
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{family} {size}: {rows[-1]['seconds']:.1f} s", file=sys.stderr)
    table = Table(title="growth with the graph; extra time in % of the step")
    for name in (
        "family",
        "size",
        "nodes",
        "budget",
        "seconds",
        "extra",
        "gap",
        "status",
        "solver",
        "memory",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        found = row["extra"] is not None
        table.add_row(
            row["family"],
            str(row["size"]),
            str(row["nodes"]),
            f"{row['share']:.0%}",
            f"{row['seconds']:.1f}",
            f"{100 * row['extra']:.3f}" if found else "-",
            f"{100 * row['gap']:.3f}" if found else "-",
            row["status"],
            row["solver"],
            f"{row['solving_bytes'] >> 20} MiB",
        )
    Console(width=120).print(table)
    if options.out is not None:
        versions = machine("torch", "transformers", "highspy", "pulp")
        options.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
