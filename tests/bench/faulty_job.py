"""The job of the kill matrix: a small perceptron whose data set writes down what is read and can go wrong once."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from orchestrator.data import SampleStream

SAMPLES = 160
# A step of a real model takes longer than to write a checkpoint of this one.
STEP_S = 0.01


def net(width: int = 32, layers: int = 3) -> nn.Module:
    """8 inputs, dropout in every layer, so that the generators matter, 4 classes."""
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(nn.Linear(8, width), *hidden, nn.Linear(width, 4))


class _Fault:
    """What goes wrong when one rank comes to a position of the stream, once.

    Args:
        kind: "out_of_memory", "hang", "nan", "full_disk" (until the marker is removed) or "none".
        rank: whose.
        position: the first position at or after which it happens.
        marker: a file that says that it has happened.
    """

    def __init__(self, kind: str, rank: int, position: int, marker: str) -> None:
        self.kind, self.rank, self.position, self.marker = kind, rank, position, Path(marker)
        self.spoils_next = self.disk_is_full = False

    def reach(self, start: int, rank: int) -> None:
        if self.disk_is_full and not self.marker.exists():
            self.disk_is_full = False
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.kind == "none" or rank != self.rank or start < self.position:
            return
        kind, self.kind = self.kind, "none"
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return
        if kind == "out_of_memory":
            raise MemoryError("made by the benchmark")
        if kind == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        self.spoils_next = kind == "nan"
        if kind == "full_disk":
            self.disk_is_full = True
            resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 10, resource.RLIM_INFINITY))


class _Samples(Dataset[Any]):
    """The samples; one is not a number where the fault says so."""

    def __init__(self, samples: TensorDataset, fault: _Fault) -> None:
        self.samples, self.fault = samples, fault

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = self.samples[index]
        if self.fault.spoils_next:
            self.fault.spoils_next = False
            inputs = torch.full_like(inputs, float("nan"))
        return inputs, target


def data(log: str, kind: str, rank: int, position: int, marker: str) -> tuple[Any, Any]:
    """Samples that a linear map has labelled; each reading of the stream becomes a line of `log`.

    Args:
        log: file of lines "rank start index index ...".
        kind: see `_Fault`, as the others.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES + 16, 8, generator=generator)
    targets = (inputs @ torch.randn(8, 4, generator=generator)).argmax(1)
    fault = _Fault(kind, rank, position, marker)
    read = SampleStream.indices

    def written_down(self: SampleStream, start: int, count: int) -> list[int]:
        here = dist.get_rank() if dist.is_initialized() else 0
        Path(log).with_name(f"rank-{here}").write_text(str(os.getpid()))
        fault.reach(start, here)
        time.sleep(STEP_S)
        indices = read(self, start, count)
        line = " ".join(map(str, [here, start, *indices])) + "\n"
        with open(log, "a") as file:
            file.write(line)
        return indices

    SampleStream.indices = written_down  # each rank is a process of its own, and this its only job
    train = TensorDataset(inputs[:SAMPLES], targets[:SAMPLES])
    return _Samples(train, fault), TensorDataset(inputs[SAMPLES:], targets[SAMPLES:])
