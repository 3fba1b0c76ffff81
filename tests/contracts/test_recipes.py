"""Every recipe in deploy/jobs is valid and trains two steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = sorted((Path(__file__).resolve().parents[2] / "deploy" / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_recipe_trains_two_steps_within_its_budget(path: Path, tmp_path: Path):
    if path.stem == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words = ["--backend", "local", "--steps", "2", "--json", "--quiet", "--run-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "train", str(path), *words],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    peaks = [step["measured_peak_bytes"] for step in steps if step.get("event") == "step"]
    plan = json.loads(next(tmp_path.glob("*/plan.json")).read_text())
    assert len(peaks) == 2
    assert max(peaks) <= plan["budget_bytes"]
