"""A long run with very many checkpoints: do memory and open files of any of its processes grow?

    python -m tests.bench.soak [--checkpoints 1000] [--minutes 0] [--workers 2] [--out soak.json]

`lowtide train` of a perceptron (a state of 3 MB with AdamW) with a checkpoint every second step, until so many are
written and so much time has passed; then SIGTERM, as a machine that is taken away gets it. Every half second the
resident bytes and the open files of the driver and of each rank are read from /proc. Compared are the medians of
the second and of the last tenth; a straight line through all but the first tenth says what a checkpoint costs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.bench.machine import machine
from tests.orchestrator.ray_head import children_of

EVERY, POLL_S = 2, 0.5
MODEL = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def net():
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 400), nn.GELU(), nn.Linear(400, 4))

def data():
    inputs = torch.randn(640, 64, generator=torch.Generator().manual_seed(0))
    samples = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return samples, samples
"""
JOB = {
    "name": "soak",
    "model": "soaked.py:net",
    "batch": {"inputs": {"shape": [8, 64]}, "targets": {"shape": [8], "dtype": "int64", "high": 4}},
    "loss": "torch.nn.functional:cross_entropy",
    "optimizer": {"name": "adamw", "lr": 0.001},
    "budget": "none",
}


def sample(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def trend(values: list[int], checkpoints: list[int]) -> dict[str, float]:
    """Medians of the second and the last tenth, and the slope of a straight line without the first."""
    tenth = max(1, len(values) // 10)
    line = statistics.linear_regression(checkpoints[tenth:], values[tenth:])
    return {
        "second_tenth": statistics.median(values[tenth : 2 * tenth]),
        "last_tenth": statistics.median(values[-tenth:]),
        "per_checkpoint": round(line.slope, 4),
    }


def soak(checkpoints: int, minutes: float, workers: int, measure_memory_every: int) -> dict[str, object]:
    """Run it; what each process had."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "soaked.py").write_text(MODEL)
        train = {
            "data": "soaked.py:data", "steps": 10_000_000, "workers": workers, "backend": "local",
            "checkpoint_every": EVERY, "run_dir": str(folder / "runs"),
            "measure_memory_every": measure_memory_every,
        }  # fmt: skip
        (folder / "job.yaml").write_text(json.dumps({**JOB, "train": train}))
        command = [sys.executable, "-m", "orchestrator.cli", "train", str(folder / "job.yaml"), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        step = 0

        def listen() -> None:
            nonlocal step
            assert process.stdout is not None
            for line in process.stdout:
                step = json.loads(line)["step"]

        thread = threading.Thread(target=listen)
        thread.start()
        started_s, seen, written = time.monotonic(), {}, []
        while process.poll() is None:
            time.sleep(POLL_S)
            if step == 0:
                started_s = time.monotonic()
                continue
            written.append(step // EVERY)
            for pid in sorted({process.pid, *children_of(process.pid)}):
                seen.setdefault(pid, []).append(sample(pid))
            if step // EVERY >= checkpoints and time.monotonic() - started_s >= 60 * minutes:
                process.send_signal(signal.SIGTERM)
                break
        status = process.wait(300)
        thread.join()
        taken_s = time.monotonic() - started_s
    assert status == 128 + signal.SIGTERM, f"the run ended with status {status}"
    of_processes = {
        ("driver" if pid == process.pid else f"process {number}"): {
            "resident_bytes": trend([resident for resident, _ in values], written),
            "open_files": trend([files for _, files in values], written),
        }
        for number, (pid, values) in enumerate(seen.items())
        if len(values) == len(written)
    }
    return {
        "checkpoints": step // EVERY,
        "seconds": round(taken_s),
        "workers": workers,
        "processes": of_processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure-memory-every", type=int, default=1, help="as in a job; 0 for never")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = soak(arguments.checkpoints, arguments.minutes, arguments.workers, arguments.measure_memory_every)
    result = {**machine("lowtide", "torch"), **found}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
