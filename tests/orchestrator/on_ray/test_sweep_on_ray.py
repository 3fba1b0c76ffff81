"""The runs of `lowtide batch-size --sweep` as Ray tasks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from typing import Any

import pytest

from tests.orchestrator.batch_size.test_batch_size_command import COMMAND, batch_size, sgd_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


def test_ray_tasks_find_what_this_process_finds(write_job: Any):
    job = sgd_job(write_job)
    words = ["--sweep", "--target-loss", "0.8", "--batches", "4,16,64", "--rates", "0.4", "--quiet", "--json"]
    here = json.loads(batch_size(job, *words, "--parallel", "1", "--out", "here.json").stdout)
    command = [*COMMAND, str(job), *words, "--backend", "ray", "--out", "ray.json"]
    there = subprocess.run(command, capture_output=True, text=True, check=False)
    assert there.returncode in (0, 1), there.stderr
    assert json.loads(there.stdout)["table"] == here["table"]
