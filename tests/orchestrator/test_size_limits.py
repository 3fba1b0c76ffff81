"""What a job's settings forbid of a division of its step is one sentence, said once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.job import JobSpec
from orchestrator.size_job import size_batches
from tests.orchestrator.test_sizing import FOUR, gpt_job, size

SOURCE = """
from torch import nn

def net():
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]
    return nn.Sequential(*layers)

def data():
    raise NotImplementedError
"""


@pytest.fixture
def norm_job(tmp_path: Path) -> Path:
    """A network with batch norm."""
    (tmp_path / "net.py").write_text(SOURCE)
    targets = {"shape": [8], "dtype": "int64", "high": 10}
    job: dict[str, Any] = {
        "name": "norm",
        "model": "net.py:net",
        "batch": {"inputs": {"shape": [8, 1, 8, 8]}, "targets": targets},
        "loss": "torch.nn.functional:cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"data": "net.py:data", "steps": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path / "job.yaml"


@pytest.mark.parametrize(("cluster", "is_gpu"), [("host x2", False), ("dgx-a100-40gb", True)])
def test_batch_norm_that_refuses_everything_says_so_once(norm_job: Path, cluster: str, is_gpu: bool):
    done = size(norm_job, "--cluster", cluster, "--global-batch", "16")
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert said.count("batch norm (") == 1
    sentence = "needs micro-batches of at least 32 samples, and the largest possible has 16: "
    # With 16 samples in all, fewer workers would not help.
    sentence += "give each rank more by a larger global batch, or set train.batch_norm to group_norm"
    assert sentence in said
    assert ("or to sync" in said) == is_gpu


def test_fewer_workers_are_offered_where_they_help(norm_job: Path):
    done = size(norm_job, "--cluster", "host x2", "--global-batch", "32")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert (
        said.count("largest possible has 32: give each rank more by a larger global batch or fewer workers")
        == 1
    )


def test_an_average_is_charged_and_refuses_shared_weights(tmp_path: Path):
    alone, averaged = tmp_path / "alone", tmp_path / "averaged"
    found = {}
    for folder, settings in ((alone, {}), (averaged, {"average": {"kind": "ema"}})):
        folder.mkdir()
        job = JobSpec.load(gpt_job(folder, **settings))
        ways, _ = size_batches(job, FOUR, global_batches=(4,), objective="time")
        found[folder] = {one.shape: one for one in ways}
    model = JobSpec.load(alone / "job.yaml").build_model(fake=False)
    average_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    for shape, one in found[averaged].items():
        if shape.sharding == "ddp":
            assert one.peak_bytes - found[alone][shape].peak_bytes == average_bytes
        else:
            assert "train.average needs the whole weights" in one.refused
            assert not found[alone][shape].refused
