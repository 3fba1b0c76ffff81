"""Predicted against measured step time of real models, with measured operations and with the roofline alone.

    python -m tests.bench.step_time                                # eight models; about ten minutes on two cores
    python -m tests.bench.step_time gpt2 resnet50 --rounds 5 --json
    python -m tests.bench.step_time --rounds 0 --measurements kept.json --out step_time.json     # the plans alone

In each round, model by model, every operation of it is visited once, and after every dozen a step of it runs,
planned with everything retained, on one thread: both see the machine in the same moods. Times are processor
seconds, medians over the rounds. The plans of both cost models are then priced by the measured one; as this takes
long and needs no quiet, `--time-limit 0` leaves it out, and `--rounds 0` makes up for it with the kept files: it
prices the steps that were measured anew and runs none.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from cost_models.hardware import load_hardware
from cost_models.measured import FittedRoofline, Measured
from cost_models.measurements import MeasuredOperation
from cost_models.roofline import Roofline
from planner.calibrating.calibrate import Calibration
from planner.calibrating.operations import RunsAlone, operations_of
from planner.calibrating.setting import setting_here
from planner.capture import capture
from planner.checking.real_step import RealStep
from planner.costed import CostedGraph, annotate
from planner.pipeline import apply
from planner.prepare import prepare
from planner.prepared import plan_within
from planner.problem import Problem
from planner.report.text_table import text_table
from planner.simulate import simulate
from planner.solvers.retain_all import RetainAll
from planner.solving import solve
from planner.tradeoff.smallest import smallest_budget
from tests.bench.machine import machine
from tests.bench.zoo_models import zoo_step

MODELS = ("resnet50", "mobilenet_v3_large", "vit", "convnext", "gpt2", "bert", "llama", "unet")
OPERATIONS_A_STEP = 12


class Subject:
    """One model of the comparison."""

    def __init__(self, name: str) -> None:
        self.name = name
        zoo = zoo_step(name)
        batch = (zoo.inputs, zoo.targets)
        self.prepared = prepare(zoo.model, batch, loss=zoo.loss)
        self.captured = capture(zoo.model, batch, loss=zoo.loss)
        self.operations = operations_of([self.captured])
        plan = plan_within(
            self.prepared, budget="none", time_limit_s=1.0, gap=0.0, solver=RetainAll.name, free_order=False
        )
        step = RealStep(zoo.inputs, zoo.targets, zoo.loss)
        self.running = step.on(apply(copy.deepcopy(zoo.model), plan))
        self.running.timed(seed=0)
        self.steps_s: list[float] = []

    def slices(self) -> Iterator[dict[str, RunsAlone]]:
        """Its operations, some at a time."""
        lines = list(self.operations)
        for begin in range(0, len(lines), OPERATIONS_A_STEP):
            yield {line: self.operations[line] for line in lines[begin : begin + OPERATIONS_A_STEP]}

    def priced(self, model: Any) -> CostedGraph:
        """The step with the seconds of a cost model."""
        return annotate(self.prepared.problem.costed.graph, model)

    def times(self) -> dict[str, Any]:
        """What its steps took, seconds."""
        return {
            "step_s": statistics.median(self.steps_s),
            "quartiles_s": statistics.quantiles(self.steps_s, n=4),
        }

    def row(
        self, measured: Measured, known: Mapping[str, MeasuredOperation], times: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Predicted and measured seconds."""
        truth, roofline = self.priced(measured), Roofline(measured.hardware)
        step_s = times["step_s"]
        works = [work for node in truth.graph.nodes for work in (node.work, *node.then)]
        others = tuple(o for line, o in known.items() if line not in self.operations)
        return {
            "model": self.name,
            "operations": len(works),
            **times,
            "measured_error": truth.step_s / step_s - 1.0,
            "measured_share": measured.measured_share(works),
            "roofline_error": self.priced(roofline).step_s / step_s - 1.0,
            "unseen_error": self.priced(FittedRoofline(roofline, others)).step_s / step_s - 1.0,
        }

    def extra_points(self, model: Any, truth: CostedGraph, *, time_limit_s: float) -> float:
        """Extra time, by the true prices, of the plan that a cost model leads to at half of the range; in %."""
        base = self.prepared.problem
        smallest = smallest_budget(base, "auto", time_limit_s=time_limit_s).budget_bytes
        half = (smallest + self.prepared.retained_all.peak_bytes) // 2
        problem = Problem(self.priced(model), half, base.static)
        solution = solve(problem, time_limit_s=time_limit_s, gap=0.002, solver="auto", free_order=False)
        assert solution.schedule is not None
        trace = simulate(Problem(truth, half, base.static), solution.schedule)
        return 100.0 * truth.extra_time_fraction(trace.time_s)


def main() -> None:
    """Measure, print the table, write the file that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds of each search for a plan")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measurements", type=Path, help="keep the measured operations in this file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    subjects = [Subject(name) for name in chosen.models]
    device = torch.device("cpu")
    setting = setting_here(hardware="host", device=device, threads=1, processes=1)
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.measurements or Path(folder) / setting.file_name
        calibration = Calibration.resumed(path, setting, device)
        for turn in range(chosen.rounds):
            for subject in subjects:
                for some in subject.slices():
                    calibration.measure(some, visits=turn + 1)
                    subject.steps_s.append(subject.running.timed(seed=turn))
    hardware = load_hardware("host").with_num_cores(1)
    measured = Measured(calibration.measurements, hardware)
    earlier = json.loads(chosen.out.read_text())["models"] if not chosen.rounds else []
    kept = {row["model"]: {key: row[key] for key in ("step_s", "quartiles_s")} for row in earlier}
    rows = [
        subject.row(measured, calibration.known, kept.get(subject.name) or subject.times())
        for subject in subjects
    ]
    for subject, row in zip(subjects, rows, strict=True) if chosen.time_limit > 0 else ():
        truth = subject.priced(measured)
        for key, model in (("plan_points", measured), ("roofline_plan_points", Roofline(hardware))):
            row[key] = subject.extra_points(model, truth, time_limit_s=chosen.time_limit)
    result = {
        "machine": machine("torch", "ray"),
        "rounds": min(len(known.visits_s) for known in calibration.known.values()),
        "overhead_s": calibration.measurements.overhead_s,
        "failed": calibration.failed,
        "median_absolute_error": statistics.median(abs(row["measured_error"]) for row in rows),
        "models": rows,
    }
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(result))
        return
    head = (
        "model",
        "calls",
        "step",
        "measured",
        "of the time",
        "roofline",
        "fitted, unseen",
        "plan",
        "by roofline",
    )
    cells = [
        (
            row["model"],
            str(row["operations"]),
            f"{row['step_s'] * 1e3:.1f} ms",
            f"{row['measured_error']:+.1%}",
            f"{row['measured_share']:.1%}",
            f"{1 + row['roofline_error']:.2f}x",
            f"{1 + row['unseen_error']:.2f}x",
            f"+{row['plan_points']:.2f} %" if "plan_points" in row else "",
            f"+{row['roofline_plan_points']:.2f} %" if "plan_points" in row else "",
        )
        for row in rows
    ]
    print("\n".join(text_table(head, cells)))
    print(
        f"overhead {result['overhead_s'] * 1e6:.0f} us an operation; not run alone: {len(calibration.failed)}"
    )
    print(f"median absolute error {result['median_absolute_error']:.1%}; {result['machine']}")


if __name__ == "__main__":
    main()
