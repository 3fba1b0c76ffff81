"""Plans of captured models at several budgets: proven gap, seconds, and the best of all other solvers.

    python -m tests.bench.captured [--only gpt2-small] [--no-others] [--out results.json]

Models have random weights on no memory at all; the step is priced on an A100 of 40 GB, without an optimizer. Each
model is captured and solved in a process of its own, whose peak resident size beyond the imports is printed.
"smallest" is the smallest budget that `smallest_budget` finds, planned once more as any other budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
SHARES = (0.8, 0.6, 0.5, 0.3)
# Seconds for each budget: the first ones must be proven, the others need a plan.
LIMITS = {0.8: 20.0, 0.6: 20.0, 0.5: 20.0, 0.3: 60.0}
HARDWARE = "a100-40gb"
MODELS = ("gpt2-small", "vit-b", "bert-base", "resnet50", "u-net", "llama-32", "gpt2-xl")
_OTHERS = ("chen_sqrt", "chen_greedy", "griewank", "chain_dp", "eviction", "materialization")


def problem_of(name: str, *, layers: int | None = None) -> Any:
    """The captured step of a model, with a budget of 0; `layers` replaces Llama's 32."""
    from cost_models.hardware import load_hardware
    from cost_models.roofline import Roofline
    from planner.capture import capture
    from planner.capturing.static import static_memory
    from planner.costed import annotate
    from planner.lower.fakes import building_without_memory
    from planner.problem import Problem
    from planner.step import StepModule
    from tests.bench.models import build

    with building_without_memory():
        model, inputs, targets, loss = build(name, layers=layers)
    step = StepModule(model, loss).train()
    captured = capture(step, (inputs, targets))
    costed = annotate(captured.graph, Roofline(load_hardware(HARDWARE)))
    return Problem(costed, 0, static_memory(captured, step, optimizer=None, world_size=1, accumulation=1))


def measure(name: str, *, others: bool) -> dict[str, Any]:
    """Every budget of one model."""
    import dataclasses
    import resource

    from planner.simulate import simulate
    from planner.solvers import solver_named
    from planner.solvers.retain_all import retain_all_schedule
    from planner.tradeoff.smallest import smallest_budget

    begin = time.perf_counter()
    problem = problem_of(name)
    capture_s = time.perf_counter() - begin
    peak = simulate(problem, retain_all_schedule(problem)).peak_bytes
    is_deep = len(problem.costed.graph.nodes) > 2000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    budgets = [(f"{share:.0%}", int(share * peak), LIMITS[share]) for share in SHARES]
    if is_deep:
        budgets = [("60%", int(0.6 * peak), 180.0)]
    else:
        smallest = smallest_budget(problem, "auto", time_limit_s=60.0)
        budgets.append(("smallest", smallest.budget_bytes, 60.0))
    rows = []
    for label, budget, limit_s in budgets:
        asked = dataclasses.replace(problem, budget_bytes=budget)
        solution = solver_named("auto", time_limit_s=limit_s).solve(asked)
        step_s = problem.costed.step_s
        row: dict[str, Any] = {
            "budget": label,
            "budget_bytes": budget,
            "share": budget / peak,
            "status": solution.status.value,
            "solver": solution.solver,
            "solve_s": solution.solve_s,
            "gap": solution.gap if solution.schedule is not None else None,
            "extra": solution.time_s / step_s - 1.0 if solution.schedule is not None else None,
        }
        if others and not is_deep:
            best = min(
                (solver_named(other, time_limit_s=limit_s).solve(asked).time_s, other) for other in _OTHERS
            )
            row["best_other"] = {"solver": best[1], "extra": best[0] / step_s - 1.0}
        rows.append(row)
    return {
        "model": name,
        "nodes": len(problem.costed.graph.nodes),
        "peak_bytes": peak,
        "capture_s": capture_s,
        "solving_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "rows": rows,
    }


def table_of(models: list[dict[str, Any]]) -> Table:
    """One line per model and budget."""
    table = Table(title=f"extra time in % of the step on {HARDWARE}; the gap is of the restricted problem")
    for name in ("model", "nodes", "budget", "extra", "gap", "status", "solver", "seconds", "best other"):
        table.add_column(name, justify="right")
    for model in models:
        for row in model["rows"]:
            found = row["extra"] is not None
            other = row.get("best_other")
            table.add_row(
                model["model"],
                str(model["nodes"]),
                f"{row['budget']} ({row['share']:.1%})",
                f"{100 * row['extra']:.4f}" if found else "-",
                f"{100 * row['gap']:.3f}" if found else "-",
                row["status"],
                row["solver"],
                f"{row['solve_s']:.1f}",
                f"{100 * other['extra']:.4f} {other['solver']}" if other else "",
            )
    return table


def main() -> None:
    """Measure each model in a process of its own; print the table, write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=MODELS)
    parser.add_argument("--no-others", action="store_true", help="do not run the other solvers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, others=not options.no_others)))
        return
    models: list[dict[str, Any]] = []
    for name in options.only or MODELS:
        command = [sys.executable, "-m", "tests.bench.captured", "--measure", name]
        command += ["--no-others"] if options.no_others else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} was left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        models.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{name}: done", file=sys.stderr)
    Console(width=120).print(table_of(models))
    for model in models:
        print(
            f"{model['model']}: captured in {model['capture_s']:.1f} s, {model['solving_bytes'] >> 20} MiB to solve"
        )
    if options.out is not None:
        versions = machine("torch", "transformers", "timm", "torchvision", "highspy", "pulp")
        options.out.write_text(
            json.dumps({**versions, "hardware": HARDWARE, "models": models}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
