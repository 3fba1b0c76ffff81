"""What measuring the gradient noise costs a training step: the byte-level GPT of the quickstart on two ranks.

    python -m tests.bench.noise_cost [--out noise_cost.json] [--rounds 40]

Two gloo ranks with a thread each, batch and model of deploy/jobs/quickstart.yaml, without a plan: a plan only makes
the step longer. One round is one step of each contender, in turn, from the same weights: forward and backward of
every micro-batch, the reduction, and what the measurement adds, up to its numbers on the host, the ranks' exchange
and the estimates of whole and groups. The plain step exchanges the loss alone, as every step of training does. The
optimizer's step is left out, which makes the shares larger. The number is the median over rounds of a contender's
time minus the plain step's of the same round, the slower rank's; as shares of the median plain step.

What is added depends on the parameters and not on the batch, so it is measured on a short step of one sequence of
16 bytes as well, whose own time hides it less; as a share of the full plain step.

"micro-batches" is what `lowtide train` does in a step that is measured, and "micro-batches, between" what stays in
the steps between two: after the first dozens it measures one in `train.measure_noise_every`, and "in train" is the
mean of such a cycle, which is what a run pays. "ranks" is the DDP communication hook. "per-parameter (before)" is
the hook as it was: norm, cast, square and sum in four kernels a parameter and micro-batch, and all of .grad read on
every rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.batch_size.noise_scale import NoiseScaleEstimator
from orchestrator.batch_size.rank_noise import RankNoiseHook
from orchestrator.data import BatchLayout
from orchestrator.noise_measurement import NoiseMeasurement
from orchestrator.optim.param_groups import parameter_groups
from orchestrator.sharding import data_parallel, without_reduction
from orchestrator.train_spec import TrainSpec
from planner.step import StepModule
from tests.bench.machine import machine, show
from tests.ranks import on_ranks

SHORT = [1, 16]

BETWEEN = "micro-batches, between"

Times = dict[str, list[tuple[float, float]]]
"""Contender -> wall and processor seconds of each of its steps."""

JOBS = Path(__file__).resolve().parents[2] / "deploy" / "jobs"


def quickstart() -> tuple[Any, dict[str, Any]]:
    """The module of the byte-level GPT, and the quickstart job."""
    spec = importlib.util.spec_from_file_location("byte_gpt", JOBS / "byte_gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, yaml.safe_load((JOBS / "quickstart.yaml").read_text())


class PerParameterHooks:
    """The measurement of micro-batches as it was before: the yardstick."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.total = torch.zeros((), dtype=torch.float64)
        for parameter in parameters:
            parameter.register_hook(self.record)

    @staticmethod
    def square(tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor).double().square()

    @torch.no_grad()
    def record(self, gradient: Tensor) -> None:
        self.total.add_(self.square(gradient))

    @torch.no_grad()
    def norms(self) -> list[float]:
        big = torch.stack([self.square(p.grad) for p in self.parameters if p.grad is not None]).sum()
        small, self.total = self.total, torch.zeros((), dtype=torch.float64)
        return [float(small), float(big)]


def contender(
    kind: str, model: nn.Module, layout: BatchLayout
) -> tuple[nn.Module, Callable[[], list[float]], Any]:
    """The wrapped model, what its step adds on this rank, and what takes in the rows of all ranks."""
    wrapped = data_parallel(model)
    assert isinstance(wrapped, DistributedDataParallel)
    groups = [group["params"] for group in parameter_groups(model)]
    if kind == "micro-batches":
        noise = NoiseMeasurement(wrapped, layout, groups=groups)
        return wrapped, noise.local_norms, noise.observe
    if kind == BETWEEN:
        noise = NoiseMeasurement(wrapped, layout, groups=groups, every=10**9)
        row = [2.0] * (2 * len(groups))
        for _ in range(100):  # enough for the measuring to be sparse
            noise.observe([row, row])
        noise.begin_step(layout)

        def observe_and_begin(rows: list[list[float]]) -> None:
            noise.observe(rows)
            noise.begin_step(layout)

        return wrapped, noise.local_norms, observe_and_begin
    estimator = NoiseScaleEstimator()

    def observe(rows: list[list[float]]) -> None:
        half = len(rows[0]) // 2
        small = sum(sum(row[:half]) for row in rows) / len(rows)
        big = rows[0][-1] if half == 1 else sum(sum(row[half:]) for row in rows)
        estimator.observe(
            small_sqnorm=small, small_batch=layout.micro_batch, big_sqnorm=big, big_batch=layout.global_batch
        )
        estimator.estimate()

    if kind == "ranks":
        hook = RankNoiseHook(groups=groups).attach(wrapped)

        def norms() -> list[float]:
            own = hook.own_observation()
            return [*own.small_by_group.tolist(), *own.big_by_group.tolist()]

        return wrapped, norms, observe
    if kind == "per-parameter (before)":
        return wrapped, PerParameterHooks(list(wrapped.parameters())).norms, observe
    return wrapped, list, lambda rows: None


def exchange(row: list[float], world_size: int) -> list[list[float]]:
    """As `Ranks.gather`."""
    mine = torch.tensor(row, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(rows, mine)
    return [other.tolist() for other in rows]


def rank_times(rank: int, accumulation: int, rounds: int, kinds: list[str], sizes: list[int]) -> Times:
    """Seconds of every step of each contender on this rank."""
    gpt, job = quickstart()
    layout = BatchLayout(sizes[0], accumulation, 2)
    made = []
    for kind in kinds:
        torch.manual_seed(0)
        model = StepModule(gpt.ByteGPT(**job["model"]["kwargs"]), gpt.next_byte_loss)
        made.append((kind, *contender(kind, model, layout)))
    batches = torch.randint(256, (accumulation, 2, *sizes), generator=torch.Generator().manual_seed(rank))
    times: Times = {kind: [] for kind in kinds}
    for number in range(rounds + 3):
        order = made[number % len(made) :] + made[: number % len(made)]
        for kind, wrapped, norms, observe in order:
            # Gradients as in training: freed, or kept where micro-batches add to data-parallel buckets.
            wrapped.zero_grad(set_to_none=accumulation == 1)
            dist.barrier()
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            for micro, (inputs, targets) in enumerate(batches):
                if micro < accumulation - 1:
                    with without_reduction(wrapped):
                        (wrapped(inputs, targets) / accumulation).backward()
                else:
                    (wrapped(inputs, targets) / accumulation).backward()
            own = norms()
            rows = exchange([0.0, *own], 2)
            observe([row[1:] for row in rows])
            if number >= 3:
                times[kind].append((time.perf_counter() - started_s, time.process_time() - started_cpu_s))
    return times


def shares(extra: list[float], plain: list[float]) -> dict[str, float]:
    """Median of what is added, its standard error, and the median as a share of the median plain step."""
    quartiles = statistics.quantiles(extra, n=4)
    # Of normal noise: the deviation is the span of the quartiles / 1.349, the median's error 1.253 of the mean's.
    error = 1.253 * (quartiles[2] - quartiles[0]) / 1.349 / len(extra) ** 0.5
    return {
        "plain_ms": round(statistics.median(plain) * 1e3, 2),
        "extra_ms": round(statistics.median(extra) * 1e3, 3),
        "standard_error_ms": round(error * 1e3, 3),
        "share_percent": round(100 * statistics.median(extra) / statistics.median(plain), 2),
        "share_error_percent": round(100 * error / statistics.median(plain), 2),
    }


def measure(accumulation: int, rounds: int, kinds: list[str], sizes: list[int]) -> dict[str, Any]:
    """What each contender adds to the plain step: to the slower rank's time, to the ranks' mean processor time."""
    kinds = ["plain", *(kind for kind in kinds if accumulation == 1 or kind != "ranks")]
    by_rank = on_ranks(rank_times, accumulation, rounds, kinds, sizes)
    found: dict[str, Any] = {}
    steps = {kind: list(zip(*(times[kind] for times in by_rank))) for kind in kinds}
    for kind in kinds[1:]:
        pairs = list(zip(steps[kind], steps["plain"]))
        walls = [(max(r[0] for r in ours), max(r[0] for r in plain)) for ours, plain in pairs]
        cpus = [
            (statistics.mean(r[1] for r in ours), statistics.mean(r[1] for r in plain))
            for ours, plain in pairs
        ]
        found[kind] = {
            name: shares([ours - plain for ours, plain in both], [plain for _, plain in both])
            for name, both in (("wall", walls), ("processor", cpus))
        }
    return found


def in_train(measured: dict[str, Any], between: dict[str, Any]) -> dict[str, Any]:
    """What a step of a run costs more on average: one in `every` is measured."""
    every = TrainSpec.model_fields["measure_noise_every"].default
    rest = every - 1

    def mean(key: str, of: str) -> float:
        return round((measured[of][key] + rest * between[of][key]) / every, 2)

    return {
        "measure_noise_every": every,
        **{f"{of} share_percent": mean("share_percent", of) for of in ("wall", "processor")},
        "share_percent_by_short_step": round(
            (measured["share_percent_by_short_step"] + rest * between["share_percent_by_short_step"]) / every,
            2,
        ),
    }


def main() -> None:
    """Measure without and with accumulation, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--short-rounds", type=int, default=300)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--kinds", nargs="+", default=["micro-batches", BETWEEN, "ranks", "per-parameter (before)"]
    )
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine("torch"), "rounds": options.rounds}
    for accumulation in options.accumulation:
        _, job = quickstart()
        full = measure(accumulation, options.rounds, options.kinds, job["batch"]["inputs"]["shape"])
        short = measure(accumulation, options.short_rounds, options.kinds, SHORT)
        for kind, found in full.items():
            extra_ms = short[kind]["wall"]["extra_ms"]
            found["short step"] = short[kind]["wall"]
            found["share_percent_by_short_step"] = round(100 * extra_ms / found["wall"]["plain_ms"], 2)
        if {"micro-batches", BETWEEN} <= full.keys():
            full["in train"] = in_train(full["micro-batches"], full[BETWEEN])
        result[f"accumulation {accumulation}"] = full
    show(result, options.out)


if __name__ == "__main__":
    main()
