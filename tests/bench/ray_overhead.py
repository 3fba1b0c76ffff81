"""What Ray costs a step: the quickstart's two ranks under Ray, beside two processes of plain torch.distributed.

    python -m tests.bench.ray_overhead [--rounds 20] [--window 4] [--out ray_overhead.json]

Three runs of the same job, plan and data are alive at the same time: `lowtide train` under Ray, the same on this
machine without Ray, and a loop by hand (DDP, the planned module, the optimizer, a DataLoader with a
DistributedSampler; no log, no noise scale, no measured memory). One at a time may run: the processes of the
others, Ray's own among them, are stopped by SIGSTOP, and windows of some seconds take turns, so that the machine is
the same for all. A step's time goes from the moment its first sample is read to the same moment of the next; the
median of a window counts, without its first two steps and its last. Windows are compared within a round; the median
of the rounds is the answer. Asked: Ray at most 1.03 times torch.distributed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.bench.machine import machine, show
from tests.orchestrator.ray_head import children_of, free_port

JOBS = Path(__file__).resolve().parents[2] / "deploy" / "jobs"
WORLD_SIZE, STARTED_STEPS, MOST_S = 2, 20, 300.0
KINDS = ("ray", "local", "plain")
# The quickstart's text; the first rank writes down when the first sample of each of its micro-batches is read.
TIMED = '''
"""The quickstart's text, whose first rank writes down when it reads."""

import os
import struct
import time

import torch.distributed as dist
from byte_gpt import python_source
from torch.utils.data import Dataset


class Timed(Dataset):
    def __init__(self, samples, path, batch):
        self.samples, self.path, self.batch, self.count = samples, path, batch, 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if self.count == 0:
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if dist.get_rank() == 0 else None
        if self.file is not None and self.count % self.batch == 0:
            os.write(self.file, struct.pack("d", time.monotonic()))
        self.count += 1
        return self.samples[index]


def data(path, batch, context):
    samples, held_out = python_source(context)
    return Timed(samples, path, batch), held_out
'''


def write_job(folder: Path, kind: str) -> Path:
    """The quickstart with endless steps and the timed text."""
    import yaml

    for path in (JOBS / "byte_gpt.py", JOBS / "quickstart.yaml"):
        shutil.copy(path, folder)
    (folder / "timed.py").write_text(TIMED)
    job = yaml.safe_load((JOBS / "quickstart.yaml").read_text())
    micro_batch = job["batch"]["inputs"]["shape"][0]
    context = job["train"]["data"]["kwargs"]["context"]
    timed = {"path": str(folder / f"{kind}.times"), "batch": micro_batch, "context": context}
    job["train"] |= {
        "data": {"target": "timed.py:data", "kwargs": timed},
        "steps": 1_000_000,
        "validate_every": 0,
        "checkpoint_every": 0,
        "run_dir": str(folder / kind),
    }
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(job))
    return path


def train_plainly(job_path: Path, plan_path: Path, port: int, rank: int) -> None:
    """One rank of the loop by hand."""
    import planner
    from orchestrator.data import load_datasets
    from orchestrator.job import JobSpec
    from orchestrator.phases import phases_of
    from planner.step import StepModule

    torch.set_num_threads(1)
    job = JobSpec.load(job_path)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(job.train.seed)
    model, loss_fn = job.build_model(fake=False), job.loss_fn()
    assert loss_fn is not None
    step = planner.apply(StepModule(model, loss_fn).train(), planner.Plan.load(plan_path))
    step = DistributedDataParallel(step, gradient_as_bucket_view=True)
    optimizer = phases_of(job)[0].make_optimizer(model)
    train_set, _ = load_datasets(job.train.data)
    sampler = DistributedSampler(train_set, num_replicas=WORLD_SIZE, rank=rank)
    loader = DataLoader(train_set, batch_size=job.micro_batch, sampler=sampler, drop_last=True)
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = step(inputs, targets)
            loss.backward()
            optimizer.step()
            loss.item()


def times_of(path: Path) -> list[float]:
    """When each step began, in seconds of the monotonic clock."""
    content = path.read_bytes() if path.exists() else b""
    return [moment for (moment,) in struct.iter_unpack("d", content[: len(content) // 8 * 8])]


class Group:
    """One way to train, with all its processes."""

    def __init__(self, kind: str, commands: list[list[str]], times: Path) -> None:
        self.kind, self.times = kind, times
        with open(times.with_suffix(".log"), "w") as log:
            self.processes = [
                subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True) for words in commands
            ]
        deadline_s = time.monotonic() + MOST_S
        while len(times_of(times)) < STARTED_STEPS:
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline_s:
                self.end()
                raise SystemExit(f"{kind} did not start: {times.with_suffix('.log').read_text()[-2000:]}")
            time.sleep(0.2)
        self.send(signal.SIGSTOP)

    def send(self, number: signal.Signals) -> None:
        """A signal to every process; those that start others first."""
        for process in self.processes:
            for pid in (process.pid, *sorted(children_of(process.pid))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def window(self, seconds: float) -> float:
        """Run for a while; the median time of its steps."""
        begin_s = time.monotonic()
        self.send(signal.SIGCONT)
        time.sleep(seconds)
        self.send(signal.SIGSTOP)
        begun = [moment for moment in times_of(self.times) if moment > begin_s][2:-1]
        if len(begun) < 5:
            raise SystemExit(
                f"a window of {seconds} s holds too few steps of {self.kind}; take a longer --window"
            )
        return statistics.median(after - before for before, after in itertools.pairwise(begun))

    def end(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def measured(folder: Path, rounds: int, window_s: float) -> list[dict[str, float]]:
    """Median step times of each round, in seconds."""
    groups: list[Group] = []
    try:
        for kind in KINDS:
            job = write_job(folder, kind)
            if kind == "plain":
                (plan,) = (folder / "local").glob("*/plan.json")
                places = [str(job), str(plan), str(free_port())]
                commands = [
                    [sys.executable, "-m", "tests.bench.ray_overhead", "--rank", str(rank), *places]
                    for rank in range(WORLD_SIZE)
                ]
            else:
                train = ["train", str(job), "--backend", kind, "--json"]
                commands = [[sys.executable, "-m", "orchestrator.cli", *train]]
            groups.append(Group(kind, commands, folder / f"{kind}.times"))
        return [{group.kind: group.window(window_s) for group in groups} for _ in range(rounds)]
    finally:
        for group in groups:
            group.end()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--window", type=float, default=4.0, help="seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("plain", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        job, plan, port = arguments.plain
        train_plainly(Path(job), Path(plan), int(port), arguments.rank)
        return
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as name:
        found = measured(Path(name), arguments.rounds, arguments.window)
    result = {
        **machine("lowtide", "torch", "ray"),
        "asked": "ray over plain at most 1.03",
        "ray_over_plain": statistics.median(row["ray"] / row["plain"] for row in found),
        "ray_over_local": statistics.median(row["ray"] / row["local"] for row in found),
        "local_over_plain": statistics.median(row["local"] / row["plain"] for row in found),
        "step_s": {kind: statistics.median(row[kind] for row in found) for kind in KINDS},
        "rounds": found,
    }
    show(result, arguments.out)


if __name__ == "__main__":
    main()
