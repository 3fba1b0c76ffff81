"""A Ray cluster of three nodes: planned on one of them, trained over them, one lost in mid-run, then another."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.ray_head import children_of, short_folder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

COMMAND = [sys.executable, "-m", "orchestrator.cli", "train"]
CHECKPOINT_EVERY = 40
LIMIT_S = 400.0
# The head's own settings: a node that is gone is known to be gone within seconds.
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes of one core each, the first one the head."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # whatever token this machine has for another cluster
    from ray.cluster_utils import Cluster

    with short_folder() as folder:
        monkeypatch.setenv(
            "RAY_TMPDIR", str(folder)
        )  # whoever asks for "the cluster of this machine" is not told
        (folder / "ray").mkdir()
        started = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "temp_dir": str(folder),
                "object_store_memory": 100_000_000,
                "_system_config": QUICK,
            },
        )
        try:
            for _ in range(2):
                started.add_node(num_cpus=1, object_store_memory=100_000_000)
            yield started
        finally:
            started.shutdown()


def lose_a_node_with_a_rank(cluster: Any) -> str:
    """Kill a node other than the head that a rank runs on; returns its id."""
    for node in list(cluster.worker_nodes):
        (raylet,) = node.all_processes["raylet"]
        family = children_of(raylet.process.pid)
        if any(b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family):
            cluster.worker_nodes.remove(node)
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            return node.node_id
    raise AssertionError("no rank runs on a node that may be lost")


def test_a_run_outlives_a_lost_node_and_says_so_when_no_room_is_left(write_job: Any, cluster: Any):
    settings = {"workers": 2, "backend": "ray", "steps": 100_000, "checkpoint_every": CHECKPOINT_EVERY}
    path = write_job(train={**settings, "validate_every": 0}, budget="1MiB")
    nodes = {cluster.head_node.node_id, *(node.node_id for node in cluster.worker_nodes)}
    process = subprocess.Popen(
        [*COMMAND, str(path), "--json", "--address", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.start()
    losses: dict[int, float] = {}
    done_again: list[int] = []
    lost: list[str] = []
    lost_at, last = 0, 0
    started_s = time.monotonic()
    story = []
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "error":  # standard error says it too
            continue
        step, last = event["step"], max(last, event["step"])
        if step in losses:  # a step that is done again, on other nodes, has the same loss to the last bit
            assert event["loss"] == losses[step]
            done_again.append(step)
        losses[step] = event["loss"]
        if (not lost and step >= 60) or (len(lost) == 1 and step >= lost_at + 60):
            lost.append(lose_a_node_with_a_rank(cluster))
            lost_at = last
            story.append(f"lost a node after step {last}, {time.monotonic() - started_s:.0f} s")
    complaint = process.stderr.read()
    timer.cancel()
    story.append(f"ended after step {last}, {time.monotonic() - started_s:.0f} s: {complaint}")
    assert process.wait() == 1, story
    assert len(lost) == 2, story
    assert sorted(losses) == list(range(1, last + 1))
    assert len(done_again) <= 2 * CHECKPOINT_EVERY + 200  # and what was on its way when the node was lost
    assert "was lost with its process: trying again from the last checkpoint" in complaint
    sentence = complaint.splitlines()[-1]
    assert "the cluster has lost nodes: the job asks for 2 workers of 1 CPU each" in sentence
    assert "has room for 1 (1 CPU on 1 node), and no autoscaler that could add nodes" in sentence
    assert "Continue with: lowtide train" in sentence
    (folder,) = (path.parent / "runs").iterdir()
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, second = [event["step"] for event in told if event["event"] == "started"]
    assert (first, second % CHECKPOINT_EVERY) == (0, 0)
    assert second > 0
    planned_on = json.loads((folder / "run.json").read_text())["planned_on"]
    assert planned_on.rpartition("node ")[2] in nodes
