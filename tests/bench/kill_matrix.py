"""Every failure at ten random moments: does the run end with the bits of one that nothing happened to?

    python -m tests.bench.kill_matrix [--out FILE.json] [--moments 10] [--only worker_killed ...] [--at-once 2]

Two ranks on the CPU in fp32 train a small perceptron with dropout for 240 steps of 8 samples, 12 epochs of 160,
with AdamW and a checkpoint every 20 steps, as `lowtide train`. A step waits for 10 ms, as if it were larger. A seed
chooses moment and rank. Where the answer of the command is to stop, it is continued with `--resume`, as it
says. Compared are every tensor of model and optimizer after the last step, bit for bit; the steps that were done
again; the samples that the effective steps have read, written down by the data set itself, rank by rank; and the
seconds from the failure to the next step. With `--only`, other failures that FILE.json has stay in it.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator import cli
from orchestrator.checkpoint import CheckpointStore, load_state
from tests.bench.faulty_job import SAMPLES
from tests.bench.machine import machine

STEPS, EVERY, BATCH, WORKERS = 240, 20, 8, 2
# How the data set's fault is called; the other failures come from outside.
INSIDE = {
    "out_of_memory": "out_of_memory",
    "hang": "hang",
    "nan_stop": "nan",
    "nan_rollback": "nan",
    "full_disk": "full_disk",
    "hang_ray": "hang",
}
OUTSIDE = (
    "worker_killed",
    "driver_killed",
    "preempted",
    "truncated",
    "bit_flipped",
    "worker_killed_ray",
    "preempted_ray",
)
# A checkpoint that is destroyed takes the steps since the one before with it.
BOUND = {"truncated": 2 * EVERY, "bit_flipped": 2 * EVERY}
# A command of its own, not a forked one.
ALONE = ("preempted", "preempted_ray", "worker_killed_ray", "hang_ray")
MOST_S = 600.0


@dataclass
class Case:
    """One failure at one moment, and what came of it."""

    failure: str
    moment: int
    step: int
    rank: int
    statuses: list[int] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    steps_lost: int = 0
    recovery_s: float | None = None
    is_identical: bool = False
    samples_wrong: int = 0
    problem: str = ""


class Command:
    """One `lowtide train`, its steps and when each was told.

    It is forked by a server that has imported what it needs, which takes most of such a short run; where its whole
    process group is signalled it is a command of its own.
    """

    def __init__(self, job: Path, case: Case, resume: Path | None) -> None:
        backend = "ray" if case.failure.endswith("_ray") else "local"
        words = [
            "train",
            str(job),
            "--json",
            "--backend",
            backend,
            *(["--resume", str(resume)] if resume else []),
        ]
        self.told: list[tuple[float, int]] = []
        self.output, self.complaint = (Path(tempfile.mkstemp(dir=job.parent)[1]) for _ in range(2))
        if case.failure in ALONE:
            with open(self.output, "w") as out, open(self.complaint, "w") as errors:
                self.process: Any = subprocess.Popen(
                    [sys.executable, "-m", "orchestrator.cli", *words],
                    stdout=out,
                    stderr=errors,
                    process_group=0,
                )
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["orchestrator.cli", "orchestrator.launch", "matplotlib.pyplot"])
            places = (words, str(self.output), str(self.complaint))
            self.process = context.Process(target=command_line, args=places)
            self.process.start()
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _status(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def _listen(self) -> None:
        with open(self.output) as file:
            line = ""
            while True:
                has_ended = self._status() is not None
                line += file.readline()
                if line.endswith("\n"):
                    event = json.loads(line)
                    if event["event"] == "step":
                        self.told.append((time.monotonic(), event["step"]))
                    line = ""
                elif has_ended:
                    return
                else:
                    time.sleep(0.002)

    def reaches(self, step: int) -> bool:
        """Wait until a step is told; False where the command ends before."""
        while self._status() is None:
            if any(number >= step for _, number in list(self.told)):
                return True
            time.sleep(0.002)
        return False

    def end(self) -> int:
        """Wait for the end; the exit status."""
        deadline_s = time.monotonic() + MOST_S
        while (status := self._status()) is None:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no end after {MOST_S} s")
            time.sleep(0.05)
        self.thread.join()
        return status


def command_line(words: list[str], output: str, complaint: str) -> None:
    """The command in a forked process: its own streams, then as from the shell."""
    for path, stream in ((output, 1), (complaint, 2)):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, stream)
        os.close(file)
    sys.argv = ["lowtide", *words]
    cli.main()


def write_job(folder: Path, case: Case) -> Path:
    """The job, its data set with the fault in it."""
    fault = {"kind": INSIDE.get(case.failure, "none"), "rank": case.rank, "position": case.step * BATCH}
    if case.failure == "full_disk":
        fault["rank"] = 0  # which writes
    data = {"log": str(folder / "read.txt"), **fault, "marker": str(folder / "happened")}
    job = {
        "name": "matrix",
        "model": "faulty_job.py:net",
        "batch": {"inputs": {"shape": [4, 8]}, "targets": {"shape": [4], "dtype": "int64", "high": 4}},
        "loss": "torch.nn.functional:cross_entropy",
        "optimizer": {"name": "adamw", "lr": 0.01},
        "budget": "1MiB" if case.failure == "out_of_memory" else "none",
        "train": {
            "data": {"target": "faulty_job.py:data", "kwargs": data},
            "steps": STEPS,
            "workers": WORKERS,
            "checkpoint_every": EVERY,
            "measure_memory_every": EVERY,
            "run_dir": str(folder / "runs"),
            "collective_timeout": "2s" if case.failure.startswith("hang") else "10min",
            "on_nan": "rollback" if case.failure == "nan_rollback" else "stop",
        },
    }
    shutil.copy(Path(__file__).with_name("faulty_job.py"), folder)
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def strike(case: Case, command: Command, folder: Path, draw: random.Random) -> None:
    """Do from outside what the case asks for, a moment after its step."""
    time.sleep(draw.uniform(0.0, 0.05))
    if case.failure.startswith("worker_killed"):
        os.kill(int((folder / f"rank-{case.rank}").read_text()), signal.SIGKILL)
    elif case.failure.startswith("preempted"):
        os.killpg(command.process.pid, signal.SIGTERM)
    else:
        os.kill(command.process.pid, signal.SIGKILL)


def damage(case: Case, run_dir: Path, draw: random.Random) -> None:
    """Cut or flip a bit of the newest checkpoint."""
    newest = CheckpointStore(run_dir / "checkpoints", keep=2).paths()[-1] / "state.pt"
    content = bytearray(newest.read_bytes())
    if case.failure == "truncated":
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    newest.write_bytes(content)


def run_case(case: Case, folder: Path, draw: random.Random, reference: dict[str, Any] | None) -> None:
    """Run it to its end, with `--resume` as often as it stops, and compare."""
    folder.mkdir(parents=True)
    job = write_job(folder, case)
    commands = [Command(job, case, None)]
    struck_s = None
    if case.failure in OUTSIDE and commands[0].reaches(case.step):
        strike(case, commands[0], folder, draw)
        struck_s = time.monotonic()
    case.statuses.append(commands[0].end())
    (run_dir,) = (folder / "runs").iterdir()
    while case.statuses[-1] != 0 and len(commands) < 4:
        if case.failure in BOUND and len(commands) == 1:
            damage(case, run_dir, draw)
        commands.append(Command(job, case, run_dir))
        case.statuses.append(commands[-1].end())
    told = [place for command in commands for place in command.told]
    for (before_s, before), (after_s, after) in itertools.pairwise(told):
        case.steps_lost += max(0, before - after + 1)
        if after <= before or (struck_s is not None and before_s <= struck_s < after_s and len(commands) > 1):
            case.recovery_s = after_s - (struck_s or before_s)
    log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    case.decisions = [f"{e['cause']}: {e['decision']}" for e in log if e["event"] == "failure"]
    case.samples_wrong = samples_wrong(log, (folder / "read.txt").read_text())
    state = load_state(CheckpointStore(run_dir / "checkpoints", keep=2).paths()[-1])
    if reference is None:
        torch.save(state, folder.parent / "reference.pt")
        case.is_identical = True
    else:
        case.is_identical = all(same(state[key], reference[key]) for key in ("model", "optimizer"))
    if case.statuses[-1] != 0 or not case.is_identical or case.samples_wrong:
        case.problem = "".join(command.complaint.read_text() for command in commands)[-1500:]


def same(one: Any, other: Any) -> bool:
    """Whether two states agree in every bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def samples_wrong(log: list[dict[str, Any]], text: str) -> int:
    """How many samples the effective steps have not read as often as they should, over all ranks.

    A rank that reads an earlier position than before does a step again: what it had read from there on is undone.
    """
    steps = [(event["step"], event["samples_seen"]) for event in log if event["event"] == "step"]
    if steps != [(step, step * BATCH) for step in range(1, STEPS + 1)]:
        return SAMPLES
    effective: dict[int, dict[int, int]] = collections.defaultdict(dict)
    for line in text.splitlines():
        rank, start, *indices = map(int, line.split())
        mine, begin = effective[rank], start // BATCH * BATCH
        for position in [position for position in mine if position >= begin]:
            del mine[position]
        mine |= dict(zip(range(start, start + len(indices)), indices, strict=True))
    read = collections.Counter((p // SAMPLES, i) for mine in effective.values() for p, i in mine.items())
    wanted = {(epoch, index): 1 for epoch in range(STEPS * BATCH // SAMPLES) for index in range(SAMPLES)}
    return sum(read[key] != wanted.get(key, 0) for key in wanted.keys() | read.keys())


def table(cases: list[Case]) -> list[str]:
    """A line a failure."""
    names = f"{'failure':18} {'runs':>4} {'ended':>5} {'same bits':>9} {'samples':>8} {'lost':>4} {'of':>3}"
    lines = [f"{names} {'next step':>16}"]
    for failure in dict.fromkeys(case.failure for case in cases):
        rows = [case for case in cases if case.failure == failure]
        times = [case.recovery_s for case in rows if case.recovery_s is not None]
        took = f"{statistics.median(times):.1f}, most {max(times):.1f} s" if times else "-"
        ended = sum(case.statuses[-1] == 0 for case in rows)
        exact = sum(case.samples_wrong == 0 for case in rows)
        lines.append(
            f"{failure:18} {len(rows):4} {ended:5} {sum(c.is_identical for c in rows):9} {exact:8} "
            f"{max(c.steps_lost for c in rows):4} {BOUND.get(failure, EVERY):3} {took:>16}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=[*OUTSIDE, *INSIDE], default=[*OUTSIDE, *INSIDE])
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = Path(name)
        run_case(Case("none", 0, 0, 0), folder / "undisturbed", random.Random(0), None)
        reference = torch.load(folder / "reference.pt", weights_only=True)
        cases, draws = [], []
        for failure in arguments.only:
            for moment in range(arguments.moments):
                draw = random.Random(f"{arguments.seed} {failure} {moment}")
                cases.append(
                    Case(failure, moment, draw.randrange(EVERY + 1, STEPS - 20), draw.randrange(WORKERS))
                )
                draws.append(draw)

        def run(number: int) -> None:
            case = cases[number]
            try:
                run_case(case, folder / f"{case.failure}-{case.moment}", draws[number], reference)
            except (OSError, ValueError, IndexError) as error:
                case.problem = f"{type(error).__name__}: {error}"
                case.statuses.append(-1)
            sys.stderr.write(f"{case}\n")

        with ThreadPoolExecutor(arguments.at_once) as pool:
            list(pool.map(run, range(len(cases))))
    if arguments.out and arguments.out.exists():  # of other failures
        before = [Case(**case) for case in json.loads(arguments.out.read_text())["cases"]]
        cases = [case for case in before if case.failure not in arguments.only] + cases
    lines = table(cases)
    print("\n".join(lines))
    if arguments.out:
        result = {
            **machine("lowtide", "torch", "ray"),
            "steps": STEPS, "checkpoint_every": EVERY, "workers": WORKERS, "seed": arguments.seed,
            "table": lines, "cases": [asdict(case) for case in cases],
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
