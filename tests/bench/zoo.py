"""Real architectures, planned at several budgets and executed beside eager: results, promised peak, extra time.

    python -m tests.bench.zoo                                      # the whole zoo; about an hour on two cores
    python -m tests.bench.zoo resnet50 gpt2 --budget 60% --json
    python -m tests.bench.zoo torchvision:resnet18 timm:vit_tiny_patch16_224 --config image_size=64
    python -m tests.bench.zoo hf:llama --config num_hidden_layers=4 --config hidden_size=256

Without --budget each model is planned at 0 %, 50 % and 75 % of its range, which goes from the smallest budget that
is found for it to the peak with everything retained, and without a budget. --json prints one object a line.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from planner.checking.check import check
from planner.checking.node_times import with_measured_times
from planner.checking.real_step import RealStep
from planner.errors import CaptureError, InfeasibleError, PlanMismatchError
from planner.inputs.workload import SolverSpec
from planner.prepare import prepare
from planner.prepared import Prepared
from planner.report.check import check_object
from planner.report.text_table import text_table
from planner.tradeoff.smallest import smallest_budget
from tests.bench.machine import machine
from tests.bench.zoo_models import ZOO, ZooStep, zoo_step

RANGE = " of range"
BUDGETS = ("0%" + RANGE, "50%" + RANGE, "75%" + RANGE, "none")


def rows_of(
    name: str,
    zoo: ZooStep,
    budgets: Sequence[str],
    *,
    time_limit: str,
    rounds: int,
    device: str,
    measure_times: bool,
) -> list[dict[str, Any]]:
    """One object for each budget of one model."""
    begin = time.perf_counter()
    model, step = on_device(zoo, device)
    prepared = prepare(model, (step.inputs, step.targets), loss=step.loss)
    if measure_times:
        prepared = with_measured_times(prepared, copy.deepcopy(model), step)
    capture_s = time.perf_counter() - begin
    solver = SolverSpec(time_limit=time_limit)
    found = []
    smallest: int | None = None
    for budget in budgets:
        begin = time.perf_counter()
        asked = budget
        if budget.endswith(RANGE):
            if smallest is None:
                smallest = smallest_budget(
                    prepared.problem, solver.name, time_limit_s=solver.time_limit_s
                ).budget_bytes
            asked = f"{share_of_range(budget, smallest, prepared)}B"
        try:
            got = check(
                prepared,
                model,
                step,
                budget=asked,
                solver=solver,
                rounds=rounds,
                tightest=budget.endswith(RANGE),
                measure_times=False,
            )
        except InfeasibleError as error:
            found.append({"model": name, "budget": budget, "infeasible": str(error)})
            continue
        whole_s = time.perf_counter() - begin
        found.append(
            {"model": name, "budget": budget, **check_object(got), "capture_s": capture_s, "whole_s": whole_s}
        )
    return found


def on_device(zoo: ZooStep, device: str) -> tuple[torch.nn.Module, RealStep]:
    """Model and batch where they are to run."""

    def moved(tree: Any) -> Any:
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tree)

    return zoo.model.to(device), RealStep(moved(zoo.inputs), moved(zoo.targets), zoo.loss)


def share_of_range(budget: str, smallest_bytes: int, prepared: Prepared[Any]) -> int:
    """Bytes of a share ("50% of range") of the way from the smallest budget to everything retained.

    Raises:
        ValueError: it does not read like that.
    """
    text = budget.removesuffix(RANGE).strip()
    if not text.endswith("%"):
        raise ValueError(f"a share of the range must read like '50% of range', got {budget!r}")
    share = float(text[:-1]) / 100.0
    return int(smallest_bytes + share * (prepared.retained_all.peak_bytes - smallest_bytes))


HEAD = (
    "model",
    "budget",
    "nodes",
    "exact",
    "peak/budget",
    "predicted",
    "extra",
    "measured",
    "eager",
    "plans",
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "measured_peak_bytes" not in row:
        what = "no plan" if "infeasible" in row else "failed"
        return (row["model"], row["budget"], what, *[""] * (len(HEAD) - 3))
    equal = [row[f"{what}_equal"] for what in ("outputs", "gradients", "buffers")]
    return (
        row["model"],
        row["budget"],
        str(row["num_nodes"]),
        "yes" if all(equal) else f"NO ({next(iter(row['first_difference'].items()))})",
        f"{row['measured_peak_bytes'] / row['budget_bytes']:.4f}" + " !" * (not row["within_budget"]),
        f"{row['prediction_error']:+.3%}",
        f"{row['extra_time_fraction']:.1%}",
        f"{row['measured_extra_time_fraction']:+.1%}",
        f"{row['eager_cpu_s']:.3f} s",
        str(row["plans_made"]),
    )


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the issue asks of the table."""
    ran = [row for row in rows if "measured_peak_bytes" in row]
    if not ran:
        return ["nothing ran"]
    exact = [row for row in ran if all(row[f"{w}_equal"] for w in ("outputs", "gradients", "buffers"))]
    errors = [abs(row["prediction_error"]) for row in ran]
    limited = [row for row in ran if row["budget"] != "none"]
    free = [row["measured_extra_time_fraction"] for row in ran if row["budget"] == "none"]
    half = [
        abs(row["measured_extra_time_fraction"] - row["extra_time_fraction"])
        for row in ran
        if row["budget"] == "50%" + RANGE
    ]
    lines = [
        f"{len({row['model'] for row in ran})} models, {len(ran)} steps ({len(limited)} within a budget); "
        f"{len(rows) - len(ran)} did not run",
        f"exact: {len(exact)} of {len(ran)}; "
        f"within budget: {sum(row['within_budget'] for row in limited)} of {len(limited)}; "
        f"first plan held in {sum(row['plans_made'] == 1 for row in limited)}",
        f"|predicted - measured|: median {statistics.median(errors):.3%}, most {max(errors):.3%}",
    ]
    if free:
        lines.append(
            f"no budget: processor time {1 + statistics.median(free):.3f} of eager's (median of {len(free)})"
        )
    if half:
        lines.append(f"50% of range: |measured - planned extra time| median {statistics.median(half):.1%}")
    return lines


def parse_config(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words, the values as JSON where they are JSON.

    Raises:
        ValueError: a word without "=".
    """
    config: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--config takes KEY=VALUE, got {pair!r}. Write --config image_size=64.")
        try:
            config[key] = json.loads(value)
        except ValueError:
            config[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return config


def main() -> None:
    """Check the named models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="of the zoo, or torchvision:, timm:, hf:NAME"
    )
    parser.add_argument(
        "--budget", action="append", help="as for lowtide plan, or '50%% of range'; repeatable"
    )
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--time-limit", default="10s", help="of each search")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps of each, planned and eager in turn"
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="prices of the cost model: quicker, for results and peaks alone",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="one object a line on stdout")
    parser.add_argument("--out", type=Path, help="write all results and the machine here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device here", file=sys.stderr)
        return
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        parser.error(f"--out needs a file in a folder that exists, got {str(options.out)!r}.")
    try:
        config = parse_config(options.config)
    except ValueError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    failed = False
    for name in options.models or ZOO:
        try:
            zoo = zoo_step(name, config=config)
            got = rows_of(
                name,
                zoo,
                options.budget or BUDGETS,
                time_limit=options.time_limit,
                rounds=options.rounds,
                device=options.device,
                measure_times=not options.roofline,
            )
        except (CaptureError, PlanMismatchError, ValueError, ImportError) as error:
            got = [{"model": name, "budget": "", "failed": str(error)}]
        except Exception as error:  # one model must not end the others
            traceback.print_exc()
            got = [{"model": name, "budget": "", "failed": f"{type(error).__name__}: {error}"}]
        rows += got
        for row in got:
            failed |= "measured_peak_bytes" not in row or not row["within_budget"]
            failed |= not all(row.get(f"{what}_equal") for what in ("outputs", "gradients", "buffers"))
            print(json.dumps(row) if options.json else "  ".join(cells(row)), flush=True)
            if "measured_peak_bytes" not in row:
                reason = row.get("infeasible") or row["failed"]
                print(f"zoo: {row['model']}: {reason}", file=sys.stderr, flush=True)
        if options.out is not None:
            facts = machine("torch", "torchvision", "timm", "transformers", "highspy")
            facts |= {"threads": torch.get_num_threads(), "device": options.device}
            options.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    if not options.json:
        print("\n".join(["", *text_table(HEAD, [cells(row) for row in rows]), "", *summary(rows)]))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
