"""Workers that come and go: 2 -> 1 -> 3 in mid-run, beside the same run on two workers throughout.

    python -m tests.bench.resize [--out resize.json] [--steps 1200]

A real Ray cluster of nodes with one processor each, on this machine: a run that asks for 1 to 3 workers begins
on two nodes, loses one after a quarter of its steps, and is given two more after half of them. The same job then
runs on two workers that stay. Asked: the same global batch in every step, the loss of every step within 1e-4
(relative) of the fixed run's, a plan for each number of workers, and the measured peak of every rank within the
budget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from tests.bench.machine import machine, show

MODEL = '''
"""A perceptron and samples that a linear map has labelled."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def net(width=128, layers=10):
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(64, width), *hidden, nn.Linear(width, 8))


def data(samples=5000):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples + 500, 64, generator=generator)
    targets = (inputs @ torch.randn(64, 8, generator=generator)).argmax(1)
    return TensorDataset(inputs[:samples], targets[:samples]), TensorDataset(inputs[samples:], targets[samples:])
'''


def job(steps: int) -> dict[str, Any]:
    """Batches of 1,536 in micro-batches of 256: 1, 2 and 3 workers have 6, 3 and 2 of them."""
    return {
        "name": "resize",
        "model": "model.py:net",
        "batch": {
            "inputs": {"shape": [256, 64]},
            "targets": {"shape": [256], "dtype": "int64", "high": 8},
        },
        "loss": "torch.nn.functional:cross_entropy",
        "optimizer": {"name": "lamb", "lr": 0.002},
        "budget": "80%",
        "train": {
            "data": "model.py:data",
            "steps": steps,
            "workers": {"min": 1, "max": 3},
            "accumulation": 2,
            "checkpoint_every": 25,
            "validate_every": 0,
        },
    }


def train(folder: Path, address: str, data: dict[str, Any], *, events: list[dict[str, Any]]) -> Path:
    """Run a job on the cluster; its events are appended as they come. Returns its folder."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    words = ["train", str(path), "--address", address, "--run-dir", str(folder / "runs"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *words], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    for line in process.stdout:
        events.append(json.loads(line) if line.startswith("{") else {"event": "words", "text": line})
    if process.wait() != 0:
        raise SystemExit(f"the run ended with status {process.returncode}")
    return Path(events[-1]["run_dir"])


def wait_for(step: int, events: list[dict[str, Any]], run: threading.Thread) -> None:
    """Until the run has done a step, or has ended."""
    while run.is_alive() and not any(event["event"] == "step" and event["step"] >= step for event in events):
        time.sleep(0.2)


def resized(folder: Path, steps: int) -> Path:
    """The run whose workers come and go."""
    from ray.cluster_utils import Cluster

    # The head computes nothing: it stays while other nodes come and go.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        events: list[dict[str, Any]] = []
        failed: list[BaseException] = []
        found: list[Path] = []

        def follow() -> None:
            try:
                found.append(train(folder, cluster.address, job(steps), events=events))
            except SystemExit as error:
                failed.append(error)

        run = threading.Thread(target=follow)
        run.start()
        wait_for(steps // 4, events, run)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for(steps // 2, events, run)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        run.join()
        if failed:
            raise failed[0]
        return found[0]
    finally:
        cluster.shutdown()


def fixed(folder: Path, steps: int) -> Path:
    """The same run on two workers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        data = job(steps)
        data["train"] |= {"workers": 2, "accumulation": 3}
        return train(folder, cluster.address, data, events=[])
    finally:
        cluster.shutdown()


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that a run has told, in its order."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_of_each_step(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A step that was done again after a restart counts as it was done last."""
    return {event["step"]: event for event in events if event["event"] == "step"}


def main() -> None:
    """Run both, compare, print or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resize-") as name:
        folder = Path(name)
        (folder / "model.py").write_text(MODEL)
        told = events_of(resized(folder, options.steps))
        ours, still = last_of_each_step(told), last_of_each_step(events_of(fixed(folder, options.steps)))
    assert list(ours) == list(still) == list(range(1, options.steps + 1))
    changes = [event for event in told if event["event"] == "resized"]
    differences = {step: abs(ours[step]["loss"] / still[step]["loss"] - 1) for step in ours}
    worst = max(differences, key=lambda step: differences[step])
    result = {
        "machine": machine("torch", "ray"),
        "steps": options.steps,
        "changes": [
            {key: change[key] for key in ("step", "before", "workers", "accumulation")} for change in changes
        ],
        "steps_done_again": sum(event["event"] == "step" for event in told) - options.steps,
        "global_batches": sorted({event["global_batch"] for event in ours.values()}),
        "largest_relative_difference": differences[worst],
        "at_step": worst,
        "peaks": [
            {
                "step": step,
                "measured_bytes": event["measured_peak_bytes"],
                "predicted_bytes": event["predicted_peak_bytes"],
            }
            for step, event in ours.items()
            if step in {1, options.steps // 4, options.steps // 2, options.steps}
        ],
        "largest_measured_over_predicted": max(
            event["measured_peak_bytes"] / event["predicted_peak_bytes"] for event in ours.values()
        ),
        "warnings": [event["message"] for event in told if event["event"] in ("warning", "failure")],
    }
    show(result, options.out)


if __name__ == "__main__":
    main()
