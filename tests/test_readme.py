"""The README's blocks run as they are printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_every_python_block_runs_and_saves_memory():
    python = blocks("python")
    assert len(python) == 1
    for block in python:
        done = run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block])
        assert done.returncode == 0, done.stderr
        planned, plain = map(float, re.findall(r"[\d.]+", done.stdout)[:2])
        assert planned <= 16.0 < plain


def test_the_yaml_block_is_the_start_of_the_quickstart():
    job = yaml.safe_load((ROOT / "deploy/jobs/quickstart.yaml").read_text())
    (block,) = (yaml.safe_load(text) for text in blocks("yaml"))
    train = block.pop("train")
    assert block == {key: job[key] for key in block}
    assert train == {key: job["train"][key] for key in train}


def test_every_plan_command_runs_as_printed(tmp_path):
    commands = [
        line.strip()
        for line in TEXT.splitlines()
        if re.match(r" {4}(lowtide plan|lowtide explain|lowtide check|python -m planner) ", line)
    ]
    assert len(commands) == 8
    (tmp_path / "graph.json").write_text(blocks("json")[0])
    for command in commands:
        words = shlex.split(command.replace("deploy/", f"{ROOT}/deploy/"))
        if words[0] == "lowtide":
            words[:1] = [sys.executable, "-m", "orchestrator.cli"]
        else:
            words[0] = sys.executable
        done = run(words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    made = {"plan.json", "front.json", "front.png", "memory.png", "schedule.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"graph.json", *made}


def test_the_bare_graphs_schedule_is_the_one_that_is_printed(tmp_path):
    (tmp_path / "graph.json").write_text(blocks("json")[0])
    command = [
        sys.executable,
        "-m",
        "planner",
        "--graph",
        "graph.json",
        "--budget",
        "80%",
        "--out",
        "out.json",
    ]
    assert run(command, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out.json").read_text().strip() in TEXT


def test_the_test_command_is_the_one_that_ci_runs():
    assert '    pip install -e ".[dev,zoo]" && pytest -n 3' in TEXT
    assert "pip install -e . && lowtide train deploy/jobs/quickstart.yaml" in TEXT
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_path_of_the_map_exists():
    section = TEXT.split("## Map")[1].split("Imports run")[0]
    folder = ""
    for line in section.splitlines():
        match = re.match(r"( {4}| {6})(\S+)", line)
        if not match:
            continue
        if len(match[1]) == 4:
            folder = match[2]
            assert (ROOT / folder).is_dir(), folder
        else:
            assert (ROOT / folder / match[2]).exists(), folder + match[2]
