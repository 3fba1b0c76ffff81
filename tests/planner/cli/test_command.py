"""`python -m planner` and `lowtide plan` on bare graphs: lines, objects, schedules, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import planner.solvers
from orchestrator.cli import app
from planner.bare_graph import read_bare_graph
from planner.errors import SolverError
from planner.just_in_time import schedule_of_order
from planner.problem import Problem
from planner.simulate import simulate
from planner.solvers.materialization import Materialization
from tests.graphs import training_chain

KEYS = [
    "status", "solver", "peak_bytes", "retained_all_peak_bytes", "static_bytes", "budget_bytes",
    "extra_time_fraction", "gap", "solve_s", "num_nodes", "num_rematerialized", "peak_owner", "hardware",
    "graph_hash",
]  # fmt: skip


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "graph.json"
    path.write_text(training_chain())
    return path


def plan(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["plan", *(str(word) for word in words)])


def refused(*words: str | Path) -> str:
    result = plan(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def test_a_graph_is_answered_with_the_object_of_a_model(graph: Path):
    result = plan("--graph", graph, "--budget", "80%", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert list(answer) == KEYS
    # With everything retained the peak is at the first backward node: 5 + 1 + 4 + 1 + 3 + 1 = 15.
    assert answer["retained_all_peak_bytes"] == 15
    assert answer["budget_bytes"] == 12
    assert answer["peak_bytes"] <= 12
    assert answer["hardware"] is None
    assert answer["static_bytes"] == 0
    # Each of the ten nodes costs 1, so the cheapest way is one node run twice.
    assert answer["extra_time_fraction"] == pytest.approx(0.1)
    assert answer["num_rematerialized"] == 1


def test_the_schedule_is_the_list_of_nodes_that_the_judge_accepts(graph: Path, tmp_path: Path):
    out = tmp_path / "schedule.json"
    result = plan("--graph", graph, "--budget", "80%", "--json", "--out", out)
    answer = json.loads(result.stdout)
    order = json.loads(out.read_text())
    problem = Problem(read_bare_graph(graph), 0)
    trace = simulate(problem, schedule_of_order(problem.costed.graph, order))
    assert trace.peak_bytes == answer["peak_bytes"]
    assert trace.time_s == pytest.approx(10.0 * (1 + answer["extra_time_fraction"]))
    assert sorted(set(order)) == list(range(10))
    assert {path.name for path in tmp_path.iterdir()} == {"graph.json", "schedule.json"}


def test_five_lines_for_people(graph: Path):
    lines = plan("--graph", graph, "--budget", "80%").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "everything retained", "budget", "predicted peak", "extra time", "solver"
    ]  # fmt: skip
    assert "10.00% of a cost of 10 (1 runs beyond the first of each node)" in lines[3]


def test_without_a_budget_everything_is_retained(graph: Path):
    answer = json.loads(plan("--graph", graph, "--json").stdout)
    assert answer["num_rematerialized"] == 0
    assert answer["peak_bytes"] == answer["budget_bytes"] == 15


def test_a_budget_below_one_node_names_it_and_the_smallest_that_works(graph: Path, tmp_path: Path):
    result = plan("--graph", graph, "--budget", "5B", "--json", "--out", tmp_path / "none.json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["status"] == "infeasible"
    # The backward node of node 1 reads nodes 0 and 1 and a gradient, and makes one: 5 + 1 + 1 + 1.
    assert answer["least_need_bytes"] == 8
    assert answer["smallest_feasible_bytes"] >= 8
    assert answer["held_up_by"].startswith("node ")
    assert sum(one["size_bytes"] for one in answer["held_up_by_values"]) == answer["smallest_feasible_bytes"]
    assert "no plan fits 5 B" in result.stderr
    assert not (tmp_path / "none.json").exists()
    works = f"{answer['smallest_feasible_bytes']}B"
    assert plan("--graph", graph, "--budget", works).exit_code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "got neither"),
        (["job.yaml", "--graph", "graph.json"], "got both"),
        (["--graph", "none.json"], "cannot be read"),
        (["--graph", "."], "Is a directory"),
        (["--graph", "graph.json", "--budget", "80"], "has no unit"),
        (["--graph", "graph.json", "--solver", "best"], "there is no solver 'best'"),
        (["--graph", "graph.json", "--time-limit", "0s"], "must be more than 0"),
        (["--graph", "graph.json", "--time-limit", "5"], "has no unit"),
        (["--graph", "graph.json", "--hardware", "host"], "no meaning for a graph"),
        (["--graph", "graph.json", "--out", "no/where.json"], "there is no folder"),
        (["--graph", "graph.json", "--out", "."], "no regular file"),
        (["--graph", "graph.json", "--picture", "x.gif"], "must end in one of .png"),
        (["--graph", "graph.json", "--free-order", "--solver", "retain_all"], "keeps the given order"),
    ],
)
def test_bad_usage_gets_a_sentence_and_status_2(graph: Path, words: list[str], expected: str, monkeypatch):
    monkeypatch.chdir(graph.parent)
    assert expected in refused(*words)


@pytest.mark.parametrize("name", [name for name in planner.solvers.solver_names() if name != "checkmate"])
def test_every_solver_answers_a_graph(graph: Path, name: str):
    result = plan("--graph", graph, "--budget", "90%", "--solver", name, "--time-limit", "5s", "--json")
    answer = json.loads(result.stdout)
    if result.exit_code == 0:
        assert answer["peak_bytes"] <= answer["budget_bytes"]
    else:
        assert result.exit_code == 1
        assert answer["smallest_feasible_bytes"] > answer["budget_bytes"]


def test_a_tenth_of_a_second_gives_a_status_and_a_sentence(tmp_path: Path):
    path = tmp_path / "long.json"
    path.write_text(training_chain(tuple(range(1, 120))))
    for budget in ("90%", "30%", "10%"):
        result = plan("--graph", path, "--budget", budget, "--time-limit", "0.1s", "--json")
        answer = json.loads(result.stdout)
        if result.exit_code == 0:
            assert answer["status"] in ("optimal", "feasible")
            assert answer["peak_bytes"] <= answer["budget_bytes"]
        else:
            assert result.exit_code == 1
            assert answer["status"] in ("infeasible", "not_found")
            assert answer["message"]


def test_huge_and_tiny_values_and_zero_costs_are_planned(tmp_path: Path):
    path = tmp_path / "wide.json"
    path.write_text(training_chain((10**15, 1, 0, 10**15, 1), cost=0.0))
    answer = json.loads(plan("--graph", path, "--budget", "99%", "--json").stdout)
    assert answer["extra_time_fraction"] == 0.0
    assert answer.get("peak_bytes", answer.get("smallest_feasible_bytes")) > 0


def test_a_graph_without_bytes_needs_none(tmp_path: Path):
    path = tmp_path / "zero.json"
    path.write_text(training_chain((0, 0, 0)).replace('"bytes": 1', '"bytes": 0'))
    result = plan("--graph", path, "--budget", "50%")
    assert result.exit_code == 0, result.output


def test_a_solver_that_fails_is_a_sentence_and_status_1(graph: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise SolverError("HiGHS failed. Report it.")

    monkeypatch.setattr(Materialization, "solve", fail)
    result = plan("--graph", graph, "--budget", "80%", "--solver", "materialization", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"status": "failed", "message": "HiGHS failed. Report it."}
    assert result.stderr == "lowtide: HiGHS failed. Report it.\n"


@pytest.mark.parametrize("question", [["--budget", "80%"], ["--sweep"], ["--smallest"]])
@pytest.mark.parametrize(
    ("library", "source"),
    [
        ("highspy", "raise ModuleNotFoundError(\"No module named 'highspy'\", name='highspy')"),
        ("highspy", "raise ImportError('libhighs.so: no such file')"),
        ("pulp", "from pulp import LpProblem"),
    ],
)
def test_a_missing_or_broken_solver_library_is_named(
    graph: Path, tmp_path: Path, question: list[str], library: str, source: str
):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / f"{library}.py").write_text(source)
    command = [sys.executable, "-m", "planner", "--graph", str(graph), *question, "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(shadow), str(Path(__file__).parents[3])])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["status"] == "failed"
    assert answer["message"].startswith(f"the solver needs {library}, which cannot be loaded: ")
    assert answer["message"].endswith(". Install it again.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--out", "x.png", "--picture", "./x.png"], ["--out", "{graph}"]])
def test_one_file_is_not_named_twice(graph: Path, words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(graph.parent)
    before = graph.read_bytes()
    assert "are the same file" in refused("--graph", graph, *(word.format(graph=graph) for word in words))
    assert [path.name for path in graph.parent.iterdir()] == ["graph.json"]
    assert graph.read_bytes() == before


def test_a_picture_does_not_replace_the_graph(graph: Path):
    named = graph.rename(graph.with_suffix(".png"))
    assert "--graph and --picture are the same file" in refused("--graph", named, "--picture", named)


def test_explain_says_that_a_graphs_schedule_is_no_plan(graph: Path, tmp_path: Path):
    out = tmp_path / "schedule.json"
    assert plan("--graph", graph, "--out", out).exit_code == 0
    result = CliRunner().invoke(app, ["explain", str(out)])
    assert result.exit_code == 2
    assert "explain reads plans of models" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--graph", "g.json", "--sweep", "--smallest"], "different questions"),
        (["--graph", "g.json", "--sweep", "--budget", "50%"], "Leave out --budget"),
        (["--graph", "g.json", "--max-batch"], "needs a JOB"),
        (["job.yaml", "--extra-time", "10%"], "goes with --max-batch"),
    ],
)
def test_questions_that_do_not_go_together_are_refused(words: list[str], expected: str):
    assert expected in refused(*words)
