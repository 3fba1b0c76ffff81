"""The arrows of the architecture: who may import whom, and what importing a package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {"cost_models": 0, "planner": 1, "orchestrator": 2}
RAY_FILES = {
    "orchestrator/backends/ray_cluster.py",
    "orchestrator/backends/ray_connection.py",
    "orchestrator/backends/ray_mailbox.py",
    "orchestrator/jobs.py",
}
# Files that may name torch; cost_models and the middle of planner are plain data.
NO_TORCH = {
    "planner/bare_graph.py",
    "planner/bare_plan.py",
    "planner/costed.py",
    "planner/errors.py",
    "planner/graph.py",
    "planner/just_in_time.py",
    "planner/plan_file.py",
    "planner/prepared.py",
    "planner/problem.py",
    "planner/residency.py",
    "planner/schedule.py",
    "planner/simulate.py",
    "planner/solution.py",
    "planner/solving.py",
    "planner/step_table.py",
    "planner/whole_file.py",
}
NO_TORCH_FOLDERS = (
    "cost_models/",
    "planner/cli/",
    "planner/report/",
    "planner/solvers/",
    "planner/tradeoff/",
)
PRIVATE_TORCH_FILES = {"planner/capture.py"}


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, lazy ones included, type-checking ones not."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by relative path"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def files() -> list[str]:
    return [str(p.relative_to(ROOT)) for package in RANK for p in python_files(package)]


@pytest.mark.parametrize("file", files())
def test_imports_run_only_along_the_arrows(file: str):
    package = file.split("/")[0]
    roots = {name.split(".")[0] for name in imported(ROOT / file)}
    above = {other for other, rank in RANK.items() if rank > RANK[package]}
    assert not roots & above
    assert not roots & {"tests", "deploy"}
    assert file in RAY_FILES or "ray" not in roots
    if file in NO_TORCH or file.startswith(NO_TORCH_FOLDERS):
        assert "torch" not in roots


@pytest.mark.parametrize("file", files())
def test_private_names_of_torch_stay_in_capture_and_lower(file: str):
    if file in PRIVATE_TORCH_FILES or file.startswith("planner/lower/"):
        pytest.skip("may name them")
    private = {
        name
        for name in imported(ROOT / file)
        if name.split(".")[0] == "torch" and any(part.startswith("_") for part in name.split("."))
    }
    assert not private


@pytest.mark.parametrize("package", ["planner", "cost_models"])
def test_importing_a_package_loads_neither_torch_nor_ray(package: str):
    code = f"import {package}, sys; print([m for m in ('torch', 'ray', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_planner_runs_where_ray_is_not_installed():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "sys.argv = ['planner', 'deploy/jobs/quickstart.yaml', '--budget', '70%', '--json']\n"
        "from planner.__main__ import main\nmain()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0, out.stderr
    assert '"status": "optimal"' in out.stdout


def test_the_planner_offers_these_names():
    import planner

    assert planner.__all__ == [
        "CaptureError",
        "CompilerError",
        "InfeasibleError",
        "Plan",
        "PlanMismatchError",
        "StepModule",
        "StepOutOfMemoryError",
        "apply",
        "plan",
    ]
    assert all(getattr(planner, name) is not None for name in planner.__all__)
