"""A job small enough to train in a second, in a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Torch reads these when it is loaded; the command line sets them as well.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

TINY = '''
"""A perceptron with dropout, and samples that a linear map has labelled."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def net(width=16, dropout=0.1):
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 4))


def deep(width=32, dropout=0.1, layers=4):
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))]
    return nn.Sequential(nn.Linear(8, width), *hidden, nn.Linear(width, 4))


def normalized(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 4))


class Crossed(nn.Module):
    """Its parameters are registered in the reverse order of their use."""

    def __init__(self):
        super().__init__()
        self.last, self.hidden, self.first = nn.Linear(256, 4), nn.Linear(256, 256), nn.Linear(8, 256)

    def forward(self, inputs):
        return self.last(self.hidden(self.first(inputs).tanh()).tanh())


def data(samples=50):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples + 10, 8, generator=generator)
    targets = (inputs @ torch.randn(8, 4, generator=generator)).argmax(1)
    return TensorDataset(inputs[:samples], targets[:samples]), TensorDataset(inputs[samples:], targets[samples:])
'''

JOB: dict[str, Any] = {
    "name": "tiny",
    "model": "tiny.py:net",
    "batch": {"inputs": {"shape": [4, 8]}, "targets": {"shape": [4], "dtype": "int64", "high": 4}},
    "loss": "torch.nn.functional:cross_entropy",
    "optimizer": {"name": "ranger", "lr": 0.01},
    "train": {
        "data": "tiny.py:data",
        "steps": 9,
        "backend": "local",
        "checkpoint_every": 3,
        "keep_checkpoints": 5,
        "validate_every": 4,
    },
}

WriteJob = Callable[..., Path]


def job_writer(folder: Path) -> WriteJob:
    """A function that writes job.yaml with some keys changed, next to tiny.py."""
    (folder / "tiny.py").write_text(TINY)

    def write(train: dict[str, Any] | None = None, **changes: Any) -> Path:
        job = {**JOB, **changes, "train": {**JOB["train"], **(train or {})}}
        path = folder / "job.yaml"
        path.write_text(json.dumps(job))
        return path

    return write


@pytest.fixture
def write_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteJob:
    """Write job.yaml with some keys changed, next to tiny.py, in a folder that becomes the current one."""
    monkeypatch.chdir(tmp_path)
    return job_writer(tmp_path)
