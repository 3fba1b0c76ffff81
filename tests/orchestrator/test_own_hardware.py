"""A job names hardware of one's own by its file, beside the job."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.job import JobSpec
from planner.inputs.workload import WorkloadError
from planner.plan_file import Plan
from tests.cost_models.test_hardware_files import GOOD_FILE
from tests.orchestrator.test_sizing import gpt_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job on a GPU that computes 2 TFLOP/s, and in the folder above one that is slower."""
    (tmp_path / "jobs").mkdir()
    path = gpt_job(tmp_path / "jobs", workers=1)
    (path.parent / "mine.toml").write_text(GOOD_FILE)
    (tmp_path / "slow.toml").write_text(GOOD_FILE.replace("4.0e11", "4.0e9"))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"hardware": "mine.toml"}))
    return path


def test_a_job_is_planned_for_a_file_beside_it(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    made = runner.invoke(app, ["plan", str(job), "--out", "a.json"])
    assert made.exit_code == 0, made.output
    # On the command line a file is relative to the working folder.
    slower = runner.invoke(app, ["plan", str(job), "--hardware", "slow.toml", "--out", "b.json"])
    assert slower.exit_code == 0, slower.output
    fast, slow = (Plan.from_json((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert fast.hardware == str(job.parent / "mine.toml")
    assert slow.hardware == str(tmp_path / "slow.toml")
    assert slow.step_s > 2 * fast.step_s


def test_a_job_that_names_no_file_is_refused(job: Path):
    (job.parent / "mine.toml").unlink()
    with pytest.raises(WorkloadError, match=r"hardware: there is no hardware file .*mine\.toml"):
        JobSpec.load(job)


def test_a_job_is_sized_for_devices_of_a_file(job: Path):
    data = yaml.safe_load(job.read_text()) | {
        "cluster": {"device": "mine.toml", "nodes": 1, "devices_per_node": 1}
    }
    job.write_text(yaml.safe_dump(data))
    best = job.parent / "best.yaml"
    done = CliRunner().invoke(app, ["size", str(job), "--json", "--write", str(best)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["device"] == "mine"
    assert JobSpec.load(best).hardware_place == str(job.parent / "mine.toml")
