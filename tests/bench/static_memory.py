"""Predicted and measured memory of each of two ranks: optimizers x shardings x models.

    python -m tests.bench.static_memory --out static_memory.json

Between steps: bytes of the storages of parameters, buffers, gradients, optimizer state and averages, which must
be the predicted ones. In a step: the most bytes beside those, against what `gathering` replays. Activations are
taken out by running b and 2b samples: they are twice as many there, so 2 peak(b) - peak(2b) is without any.
It does not depend on the optimizer and is measured with the first one alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import AveragedModel

from orchestrator import sharding as sharing
from orchestrator.optim import build_optimizer
from planner.blocks import block_names
from planner.capturing.optimizer_step import unique_bytes
from planner.capturing.rank_memory import RankMemory, Sharding, rank_memory
from planner.measure import PeakMeter, live_tensors
from tests.bench.machine import machine
from tests.models import BatchNormNet, TinyGPT, token_loss
from tests.ranks import on_ranks

WORLD = 2
SIZES = (2, 4)
# Gloo's threads free what they copied some time after a collective: how long to wait, and how often to try.
SETTLE_S = 0.002
MOST_STEPS = 60
SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp", "fsdp_keep")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-2, "momentum": 0.9},
    "adamw": {"lr": 1e-3},
    "lamb": {"lr": 1e-3},
    "ranger_lars": {"lr": 1e-3},
}


def uneven(width: int = 33) -> nn.Module:
    """Blocks whose every width is odd, and a last layer of one row, which rank 1 has none of."""
    blocks = [
        nn.Sequential(
            nn.Linear(width, 2 * width + 1), nn.GELU(), nn.Linear(2 * width + 1, width), nn.LayerNorm(width)
        )
        for _ in range(4)
    ]
    return nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 1))


@dataclass(frozen=True)
class Model:
    """A model with the smallest batch: its activations are to be few beside its parameters."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    loss: Callable[[Any, Any], torch.Tensor]


MODELS = {
    "gpt": Model(
        lambda: TinyGPT(width=128, layers=4, tied=True),
        lambda size: (torch.randint(0, 64, (size, 2)), torch.randint(0, 64, (size, 2))),
        token_loss,
    ),
    "uneven mlp": Model(uneven, lambda size: (torch.randn(size, 5), torch.randn(size, 1)), F.mse_loss),
    "conv": Model(
        BatchNormNet,
        lambda size: (torch.randn(size, 3, 4, 4), torch.randint(0, 10, (size,))),
        F.cross_entropy,
    ),
}


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    optimizer: str
    sharding: Sharding
    accumulation: int = 1


CASES = [
    *(Case(model, name, kind) for model in MODELS for name in OPTIMIZERS for kind in SHARDINGS),
    *(Case(model, "sgd", kind, 3) for model in MODELS for kind in SHARDINGS),
]


@dataclass(frozen=True)
class Row:
    """One rank of one run; bytes.

    Attributes:
        step_peaks: the least peak of its steps beside what was there, with b and with 2b samples; None for
            optimizers that it is not measured with.
    """

    model: str
    optimizer: str
    sharding: str
    accumulation: int
    rank: int
    predicted: dict[str, int]
    measured: dict[str, int]
    communication_predicted: int
    gathered_predicted: int
    step_peaks: tuple[int, int] | None

    @property
    def difference(self) -> int:
        """Measured minus predicted, between steps."""
        return sum(self.measured.values()) - sum(self.predicted.values())


@dataclass(frozen=True)
class Message:
    """What a step holds beside the rest, of any optimizer on any rank; bytes."""

    model: str
    sharding: str
    accumulation: int
    predicted: int
    measured: int


def messages(rows: list[Row]) -> list[Message]:
    """Predicted and measured peaks of the steps of sharded ranks."""
    found = []
    for key in dict.fromkeys((row.model, row.sharding, row.accumulation) for row in rows):
        alike = [row for row in rows if (row.model, row.sharding, row.accumulation) == key]
        if key[1] != "ddp" and alike[0].step_peaks is not None:
            peaks = [row.step_peaks for row in alike if row.step_peaks is not None]
            one, two = (min(found[size] for found in peaks) for size in range(2))
            (predicted,) = {row.communication_predicted for row in alike}
            found.append(Message(*key, predicted=predicted, measured=2 * one - two))
    return found


def measure(rank: int, cases: list[Case]) -> list[Row]:
    """Every case on this rank."""
    return [_row(rank, case) for case in cases]


def _row(rank: int, case: Case) -> Row:
    spec, sharding = MODELS[case.model], case.sharding
    torch.manual_seed(0)
    model = spec.make()
    blocks = block_names(model)

    def build(module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(case.optimizer, module, **OPTIMIZERS[case.optimizer])

    predicted = rank_memory(
        model,
        optimizer=build,
        world_size=WORLD,
        sharding=sharding,
        rank=rank,
        blocks=blocks if sharding != "ddp" else (),
        accumulation=case.accumulation,
        averaged=True,
        staging=True,
    )
    if sharding == "ddp":
        step: nn.Module = sharing.data_parallel(model)
    else:
        step = sharing.shard(
            model, blocks=blocks, reshard_after_forward=sharding == "fsdp", device=torch.device("cpu")
        )
        _wait_for_gloo(step)
    built = build(model)
    average = _average(model, sharding)

    def peak(size: int) -> int:
        batch = spec.batch(size)
        runs = (_step(step, model, built, batch, spec.loss, case.accumulation) for _ in itertools.count())
        return _least(runs)

    peaks = None
    if case.optimizer == "sgd" and sharding != "ddp":
        peaks = peak(SIZES[0]), peak(SIZES[1])
    else:
        spec.loss(step(spec.batch(2)[0]), spec.batch(2)[1]).backward()
        built.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return Row(
        case.model,
        case.optimizer,
        sharding,
        case.accumulation,
        rank,
        predicted=_parts(predicted),
        measured={
            "parameters": _bytes(model.parameters()),
            "buffers": _bytes(model.buffers()),
            "gradients": _bytes(gradients),
            "optimizer": _bytes(leaf for state in built.state.values() for leaf in state.values()),
            "average": _bytes(average),
        },
        communication_predicted=predicted.communication_bytes,
        gathered_predicted=predicted.gathered_bytes,
        step_peaks=peaks,
    )


def _parts(memory: RankMemory) -> dict[str, int]:
    return {
        "parameters": memory.parameter_bytes,
        "buffers": memory.buffer_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes,
        "average": memory.average_bytes,
    }


def _bytes(leaves: Any) -> int:
    tensors = [getattr(leaf, "_local_tensor", leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return unique_bytes(tensors)


def _average(model: nn.Module, sharding: Sharding) -> list[torch.Tensor]:
    """Tensors of a running average; of a sharded model, which cannot be copied as a module, one of each share."""
    if sharding == "ddp":
        copy = AveragedModel(model)
        return [*copy.parameters(), *copy.buffers()]
    tensors = [*model.parameters(), *model.buffers()]
    return [*(tensor.detach().clone() for tensor in tensors), torch.tensor(0)]


class _Patient:
    """A collective after which gloo's threads have time to free what they copied; else that may come later."""

    def __init__(self, collective: Callable[..., Any]) -> None:
        self.collective = collective

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, *args: Any, **options: Any) -> Any:
        work = self.collective(output_tensor, input_tensor, *args, group=group, **options)
        if work is not None:
            work.wait()
        time.sleep(SETTLE_S)
        return work


def _wait_for_gloo(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(_Patient(dist.all_gather_into_tensor))  # type: ignore[arg-type]
            part.set_custom_reduce_scatter(_Patient(dist.reduce_scatter_tensor))  # type: ignore[arg-type]


def _step(
    step: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    loss: Any,
    micro_batches: int,
) -> int | None:
    """One step; the most bytes that its forward and backward took beside what was there.

    None if other bytes than those of tensors appeared or went: gloo's threads free what they copied when they can,
    and what is freed a step later makes that step's peak too low.
    """
    optimizer.zero_grad()
    with PeakMeter("cpu").step(live=live_tensors(model, optimizer, batch)) as measured:
        for _ in range(micro_batches - 1):
            with sharing.without_reduction(step):
                loss(step(batch[0]), batch[1]).backward()
        loss(step(batch[0]), batch[1]).backward()
        time.sleep(SETTLE_S)
    left_bytes = unique_bytes(live_tensors(model, optimizer, batch))
    optimizer.step()
    return measured.peak_bytes - measured.live_bytes if measured.left_bytes == left_bytes else None


def _least(peaks: Iterator[int | None]) -> int:
    """The least of the undisturbed peaks, once two steps have shown it: what gloo frees late only adds."""
    seen: list[int] = []
    for peak in itertools.islice(peaks, MOST_STEPS):
        seen += [peak] if peak is not None else []
        is_done = torch.tensor(bool(seen) and seen.count(min(seen)) > 1)
        dist.all_reduce(is_done, dist.ReduceOp.MIN)  # All ranks take as many steps.
        if is_done:
            break
    if not seen:
        raise RuntimeError(f"gloo freed nothing in time in {MOST_STEPS} steps: run this on a quieter machine")
    return min(seen)


def main() -> None:
    """Run all, print the tables, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for both in zip(*on_ranks(measure, CASES), strict=True) for row in both]
    print(
        "between steps: model, optimizer, sharding, micro-batches, rank, predicted, measured, difference [B]"
    )
    for row in rows:
        numbers = f"{sum(row.predicted.values()):10d} {sum(row.measured.values()):10d} {row.difference:8d}"
        names = f"{row.model:11s}{row.optimizer:12s}{row.sharding:10s}{row.accumulation:2d}"
        print(f"{names}{row.rank:3d} {numbers}")
    print("in a step: model, sharding, micro-batches, predicted, measured, difference [B]")
    for message in messages(rows):
        numbers = f"{message.predicted:10d} {message.measured:10d} {message.measured - message.predicted:8d}"
        print(f"{message.model:11s}{message.sharding:10s}{message.accumulation:2d} {numbers}")
    if options.out:
        data = {
            **machine("torch"),
            "between_steps": [asdict(row) for row in rows],
            "in_a_step": [asdict(message) for message in messages(rows)],
        }
        options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
