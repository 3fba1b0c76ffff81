"""Candidates of `lowtide size` run for real on two workers of this machine: predicted beside measured samples/s.

    python -m tests.bench.sizing_real                       # about twenty minutes on two cores
    python -m tests.bench.sizing_real --rounds 1 --steps 8 --json

Measures the operations of the quickstart's byte-level GPT with one process and with two at a time, sizes a global
batch of 32 samples, and trains each candidate with `lowtide train` for some steps: all in every round, each time in
another order. Samples a second are those of the median step. The speed of a shared machine drifts by a third within
minutes, so rates are compared within a round: a candidate's rate is the median over the rounds of its share of the
geometric mean of its round, times the geometric mean of all. Spearman's correlation is over all candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from cost_models.cluster_file import host_cluster
from orchestrator.calibrating import calibrate
from orchestrator.job import JobSpec
from orchestrator.size_job import size_batches
from orchestrator.step_shape import Sized
from planner.calibrating.request import CalibrationRequest
from planner.report.text_table import text_table
from tests.bench.machine import machine

ROOT = Path(__file__).resolve().parents[2]
GLOBAL_BATCH = 32
WARM_UP = 2


def job_at(folder: Path, *, budget: str) -> Path:
    """The quickstart, without what disturbs the timing of a step."""
    for name in ("byte_gpt.py", "quickstart.yaml"):
        shutil.copy(ROOT / "deploy" / "jobs" / name, folder)
    text = (folder / "quickstart.yaml").read_text()
    text = text.replace("budget: 50% of activations", f"budget: {budget}\nmeasurements: measurements")
    text = text[: text.index("  validate_every")] + "  measure_memory_every: 0\n  backend: local\n"
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def candidates(job: JobSpec, count: int) -> list[Sized]:
    """The best, and others spread over the order of the prediction."""
    found, _ = size_batches(job, host_cluster(2), global_batches=(GLOBAL_BATCH,), objective="time")
    fitting = [sized for sized in found if not sized.refused]
    if len(fitting) <= count:
        return fitting
    places = sorted({round(at * (len(fitting) - 1) / (count - 1)) for at in range(count)})
    return [fitting[place] for place in places]


def samples_per_s(job: JobSpec, sized: Sized, folder: Path, *, steps: int) -> float:
    """Train it in processes of its own; samples a second of the median step."""
    path = folder / "candidate.yaml"
    path.write_text(job.with_shape(sized.shape, is_blockwise=sized.is_blockwise).to_yaml())
    runs = folder / "runs"
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(path), "--steps", str(steps)]
    command += ["--run-dir", str(runs), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{sized.shape} ended with {done.returncode}: {done.stderr[-500:]}")
    (run,) = runs.iterdir()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(runs)
    rates = [event["samples_per_s"] for event in events if event["event"] == "step"][WARM_UP:]
    return statistics.median(rates)


def steady(rates: list[list[float]]) -> list[float]:
    """Rates [candidate][round] without the drift from round to round: one a candidate."""
    rounds = [statistics.geometric_mean(found) for found in zip(*rates, strict=True)]
    level = statistics.geometric_mean(rounds)
    return [
        level * statistics.median(rate / own for rate, own in zip(found, rounds, strict=True))
        for found in rates
    ]


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; without ties."""

    def ranks(numbers: list[float]) -> list[int]:
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        return [order.index(at) for at in range(len(numbers))]

    a, b = ranks(first), ranks(second)
    count = len(a)
    return 1.0 - 6.0 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (count * (count * count - 1))


def main() -> None:
    """Measure, size, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--visits", type=int, default=3)
    parser.add_argument("--budget", default="150MiB", help="of each rank")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = job_at(folder, budget=chosen.budget)
        for processes in (1, 2):
            calibrate(
                CalibrationRequest(
                    jobs=(path,),
                    folder=folder / "measurements",
                    visits=chosen.visits,
                    processes=processes,
                    threads=None,
                    micro_batches="1,2,4,8,16,32",
                    device="cpu",
                    hardware="host",
                    picture=None,
                ),
                False,
            )
        job = JobSpec.load(path)
        sized = candidates(job, chosen.candidates)
        measured: list[list[float]] = [[] for _ in sized]
        for number in range(chosen.rounds):
            for at in random.Random(number).sample(range(len(sized)), len(sized)):
                candidate = sized[at]
                measured[at].append(samples_per_s(job, candidate, folder, steps=chosen.steps))
                print(candidate.shape, candidate.samples_per_s, measured[at], file=sys.stderr, flush=True)
    rates = steady(measured)
    predicted = [candidate.samples_per_s for candidate in sized]
    result: dict[str, Any] = {
        "machine": machine("torch", "ray"),
        "global_batch": GLOBAL_BATCH,
        "budget": chosen.budget,
        "rounds": chosen.rounds,
        "spearman": spearman(predicted, rates),
        "spearman_by_round": [spearman(predicted, list(found)) for found in zip(*measured, strict=True)],
        "best_predicted_of_best_measured": rates[0] / max(rates),
        "candidates": [
            {
                **vars(candidate.shape),
                "predicted_samples_per_s": candidate.samples_per_s,
                "measured_samples_per_s": rate,
                "measured_by_round": found,
                "remat_s": candidate.remat_s,
                "exposed_s": candidate.exposed_s,
                "is_blockwise": candidate.is_blockwise,
            }
            for candidate, rate, found in zip(sized, rates, measured, strict=True)
        ],
    }
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(result))
        return
    head = ("workers", "sharding", "micro", "accum", "predicted", "measured", "ratio")
    rows = [
        (
            str(candidate.shape.workers),
            candidate.shape.sharding,
            str(candidate.shape.micro_batch),
            str(candidate.shape.accumulation),
            f"{candidate.samples_per_s:.1f}/s",
            f"{rate:.1f}/s",
            f"{candidate.samples_per_s / rate:.2f}",
        )
        for candidate, rate in zip(sized, rates, strict=True)
    ]
    print("\n".join(text_table(head, rows)))
    share = result["best_predicted_of_best_measured"]
    print(f"Spearman {result['spearman']:.3f}; the best predicted reaches {share:.1%} of the best measured")
    print(result["machine"])


if __name__ == "__main__":
    main()
