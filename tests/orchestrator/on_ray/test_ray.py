"""The same training on Ray's workers: equal losses, a killed worker, a submitted job."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.ray_head import children_of, ray_head, short_folder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

COMMAND = [sys.executable, "-m", "orchestrator.cli"]
END_S = 20.0


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def losses(objects: list[dict[str, Any]]) -> dict[int, float]:
    """Loss of each step; of one that was done twice, the second."""
    return {part["step"]: part["loss"] for part in objects if part["event"] == "step"}


def local_run(path: Path) -> list[dict[str, Any]]:
    command = [*COMMAND, "train", str(path), "--json", "--backend", "local"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return events(done.stdout)


def is_running(pid: int) -> bool:
    """Whether a process exists; one that has ended and only waits to be collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_a_killed_worker_costs_no_bit_of_the_loss(write_job: Any, tmp_path: Path):
    path = write_job(train={"workers": 2, "steps": 200, "checkpoint_every": 40}, budget="1MiB")
    expected = local_run(path)
    process = subprocess.Popen(
        [*COMMAND, "train", str(path), "--json", "--backend", "ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    workers: set[int] = set()
    for line in process.stdout:
        lines.append(line)
        if not workers and json.loads(line).get("step", 0) >= 60:
            family = children_of(process.pid)
            workers = {
                pid for pid in family if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
            }
            assert len(workers) == 2
            os.kill(max(workers), signal.SIGKILL)
    complaint = process.stderr.read() if process.stderr else ""
    assert process.wait() == 0, complaint
    got = events("".join(lines))
    assert losses(got) == losses(expected)
    assert got[-1]["validation_after"] == expected[-1]["validation_after"]
    assert re.fullmatch(
        r"warning: rank \d was lost with its process: trying again from the last checkpoint, 1 of at most 3 "
        r"times\n",
        complaint,
    )
    assert {path.name for path in Path(got[-1]["run_dir"]).iterdir()} == {
        "plan.json", "metrics.jsonl", "checkpoints", "tensorboard", "run.json", "memory.png", "loss.png",
    } | {path.name for path in Path(got[-1]["run_dir"]).glob("error-rank-*.txt")}  # fmt: skip
    log = [json.loads(line) for line in (Path(got[-1]["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] == "step"] == list(range(1, 201))
    deadline_s = time.monotonic() + END_S
    while left := {pid for pid in family if is_running(pid)}:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.2)


@pytest.fixture
def head() -> Iterator[str]:
    """The Jobs address of a Ray head of two cores that ends with the test."""
    with short_folder() as folder, ray_head(folder, {}) as started:
        yield started.jobs


def test_a_submitted_job_trains_and_its_status_is_the_commands(write_job: Any, tmp_path: Path, head: str):
    path = write_job(train={"backend": "ray", "workers": 1, "steps": 5}, budget="1MiB")
    expected = local_run(path)

    def lowtide(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words, "--address", head], capture_output=True, text=True, check=False
        )

    good = lowtide("submit", str(path), "--run-dir", str(tmp_path / "there"), "--json")
    assert good.returncode == 0, good.stdout + good.stderr
    got = events(good.stdout)
    assert losses(got) == losses(expected)
    assert Path(got[-1]["run_dir"]).is_relative_to(tmp_path / "there")

    # Only a rank reads the data, so only a rank can see that it cannot be used; that ends the job without retries.
    bad = lowtide("submit", str(write_job(train={"backend": "ray", "data": "tiny.py:net"})))
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert "rank 0: train.data: target 'tiny.py:net' must return the pair" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert "trying again" not in bad.stderr
    assert bad.stdout == ""

    rows = [line.split("\t") for line in lowtide("list").stdout.splitlines()]
    assert [row[1] for row in rows] == ["SUCCEEDED", "FAILED"]
    assert lowtide("status", rows[0][0]).stdout.strip() == "SUCCEEDED"
    assert losses(events(lowtide("logs", rows[0][0]).stdout)) == losses(expected)
    unknown = lowtide("stop", "nobody")
    assert unknown.returncode == 2
    assert "knows no job 'nobody'" in unknown.stderr
