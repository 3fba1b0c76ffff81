"""What a checkpoint every 50 steps costs: windows of 50 steps with one beside windows without, in one run.

    python -m tests.bench.checkpoint_cost [--pairs 5] [--out checkpoint_cost.json]

The quickstart (two ranks, plan and data as it is) with a checkpoint every 100 steps and no validation. Steps are
told by rank 0 as they end. A window of 50 steps has a checkpoint in its middle, the next one has none, and so on,
so that the machine is the same for both. A window is compared with the mean of its neighbours; the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from orchestrator.backends import local
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.planning import plan_job
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment
from tests.bench.machine import machine, show

WINDOW = 50
QUICKSTART = Path(__file__).resolve().parents[2] / "deploy" / "jobs" / "quickstart.yaml"


def step_ends(job: JobSpec, plan: str, folder: Path) -> dict[int, float]:
    """When each step ended, in seconds."""
    ends: dict[int, float] = {}

    def take(event: Event) -> None:
        if event["event"] == "step":
            ends[event["step"]] = time.perf_counter()

    assignment = Assignment(job.to_data(), str(job.model.folder), str(folder), plan)
    local.run(assignment, job, on_event=take, stop=StopSignal(lambda: None))
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    job = JobSpec.load(QUICKSTART).with_changes(
        {
            "backend": "local",
            "steps": 2 * WINDOW * arguments.pairs + 2 * WINDOW,
            "checkpoint_every": 2 * WINDOW,
            "validate_every": 0,
        }
    )
    with tempfile.TemporaryDirectory(prefix="cost-") as name:
        ends = step_ends(job, plan_job(job).to_json(), Path(name))
    # Window w is the 50 steps after step 25 + 50 w; those of odd w have a checkpoint in their middle.
    edges = range(WINDOW // 2, job.train.steps - WINDOW // 2 + 1, WINDOW)
    windows_s = [ends[edge + WINDOW] - ends[edge] for edge in edges if edge + WINDOW in ends]
    ratios = [
        windows_s[odd] / statistics.mean((windows_s[odd - 1], windows_s[odd + 1]))
        for odd in range(1, len(windows_s) - 1, 2)
    ]
    result = {
        **machine("lowtide", "torch"),
        "median_share": statistics.median(ratios) - 1,
        "shares": [ratio - 1 for ratio in ratios],
        "step_s": statistics.median(windows_s) / WINDOW,
    }
    show(result, arguments.out)


if __name__ == "__main__":
    main()
