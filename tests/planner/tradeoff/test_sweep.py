"""Sweeps and their processes, the smallest budget."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from planner.bare_graph import read_bare_graph
from planner.errors import SolverError
from planner.problem import Problem
from planner.report.front_plot import front_figure
from planner.residency import holders
from planner.simulate import simulate
from planner.solution import Status
from planner.solvers.bounds import least_need_bytes
from planner.solvers.materialization import Materialization
from planner.tradeoff.smallest import smallest_budget
from planner.tradeoff.sweep import Front, budgets_between, sweep
from planner.tradeoff.workers import Outcome, Task, run_tasks
from tests.graphs import chain, priced, problem, training_chain

SIZES = (6, 1, 5, 2, 7, 1, 4, 3, 6, 2)


def long_chain() -> Problem:
    return problem(priced(chain(SIZES)), 0, parameter_bytes=3)


@pytest.fixture(scope="module")
def front() -> Front:
    return sweep(long_chain(), time_limit_s=2.0, workers=2)


def test_a_front_goes_from_the_smallest_budget_to_everything_retained(front: Front):
    asked = long_chain()
    assert len(front.points) == 12
    assert front.points[0].budget_bytes == front.smallest.budget_bytes >= least_need_bytes(asked)
    # All ten values, a gradient and the parameters: 37 + 1 + 3.
    assert front.points[-1].budget_bytes == front.retained_all_peak_bytes == 41
    assert front.points[-1].extra_time_fraction == 0.0


def test_a_front_is_monotone_and_every_point_is_replayed_within_its_budget(front: Front):
    extras = [point.extra_time_fraction for point in front.points if point.extra_time_fraction is not None]
    assert len(extras) == 12
    assert extras == sorted(extras, reverse=True)
    for point in front.points:
        assert point.schedule is not None
        assert point.peak_bytes is not None
        trace = simulate(long_chain(), point.schedule)
        assert trace.peak_bytes == point.peak_bytes <= point.budget_bytes
        assert trace.time_s == pytest.approx(20.0 * (1.0 + (point.extra_time_fraction or 0.0)))


def test_the_smallest_budget_is_the_flattest_plan_of_the_front(monkeypatch: pytest.MonkeyPatch):
    # The search for the smallest budget finds nothing but everything retained; a baseline finds a flatter plan.
    asked = long_chain()
    found = smallest_budget(asked, "auto", time_limit_s=2.0)
    whole = smallest_budget(asked, "retain_all", time_limit_s=2.0)
    assert found.budget_bytes < whole.budget_bytes == 41
    monkeypatch.setattr("planner.tradeoff.sweep.smallest_budget", lambda *_, **__: whole)
    monkeypatch.setattr(
        "planner.tradeoff.sweep.run_tasks",
        lambda *_, done, **__: done(Outcome(Task(41, "auto", {"gap": 0.002}), found.solution)),
    )
    front = sweep(asked, time_limit_s=2.0)
    assert front.smallest.budget_bytes == front.pareto[0][0] == found.budget_bytes
    assert [point.budget_bytes for point in front.points] == [found.budget_bytes, 41]
    assert front.points[0].peak_bytes == found.budget_bytes
    there = holders(asked, front.smallest.schedule, front.smallest.trace)
    assert sum(one.size_bytes for one in there) == found.budget_bytes


def test_no_point_is_beaten_by_a_baseline(front: Front):
    for points in front.baselines.values():
        for theirs in points:
            ours = [p for p in front.points if p.budget_bytes >= (theirs.peak_bytes or 0)]
            assert ours[0].extra_time_fraction is not None
            assert ours[0].extra_time_fraction <= (theirs.extra_time_fraction or 0.0) + 1e-9


def test_the_staircase_holds_every_plan_that_no_other_beats(front: Front):
    peaks, extras = zip(*front.pareto, strict=True)
    assert list(peaks) == sorted(peaks)
    assert list(extras) == sorted(extras, reverse=True)
    every = [*front.points, *(point for points in front.baselines.values() for point in points)]
    for point in every:
        assert point.peak_bytes is not None
        best = min(extra for peak, extra in front.pareto if peak <= point.peak_bytes)
        assert best <= (point.extra_time_fraction or 0.0) + 1e-9


def test_a_sweep_in_one_process_finds_the_same(front: Front):
    here = sweep(long_chain(), time_limit_s=2.0, workers=1)
    optimal = [
        (one.extra_time_fraction, two.extra_time_fraction)
        for one, two in zip(front.points, here.points, strict=True)
        if one.status == two.status == "optimal"
    ]
    assert optimal
    for one, two in optimal:
        assert one == pytest.approx(two)


def test_a_plan_of_a_lower_budget_replaces_a_worse_one(monkeypatch: pytest.MonkeyPatch):
    solve = Materialization.solve

    def worse_when_roomy(self: Materialization, asked: Problem) -> Any:
        # Within 33 bytes and more, it finds only what fits 27.
        return solve(self, dataclasses.replace(asked, budget_bytes=min(asked.budget_bytes, 27)))

    monkeypatch.setattr(Materialization, "solve", worse_when_roomy)
    front = sweep(long_chain(), solver="materialization", time_limit_s=2.0, workers=1, baselines=False)
    extras = [point.extra_time_fraction for point in front.points if point.extra_time_fraction is not None]
    assert extras == sorted(extras, reverse=True)


def test_budgets_are_spread_evenly():
    assert budgets_between(10, 21, 12) == list(range(10, 22))
    assert budgets_between(5, 5, 12) == [5]


def test_a_solver_that_fails_in_a_worker_is_an_outcome(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise SolverError("HiGHS failed")

    monkeypatch.setattr(Materialization, "solve", fail)
    outcomes: list[Outcome] = []
    task = Task(30, "materialization", {})
    run_tasks(long_chain(), [task], workers=1, start=lambda _: None, done=outcomes.append)
    assert outcomes == [Outcome(task, None, "HiGHS failed")]


class Deadly:
    """Ends the process that reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_worker_that_dies_is_an_outcome_and_the_others_still_run():
    outcomes: list[Outcome] = []
    fine = Task(41, "retain_all", {})
    tasks = [Task(40, "retain_all", {"bomb": Deadly()}), fine, fine]
    run_tasks(long_chain(), tasks, workers=2, start=lambda _: None, done=outcomes.append)
    assert len(outcomes) == 3
    dead = [one for one in outcomes if one.solution is None]
    assert dead[0].failure == "the solver's process ended without an answer"
    alive = [one.solution.status for one in outcomes if one.solution is not None]
    assert alive == [Status.OPTIMAL] * len(alive) != []


def test_the_smallest_budget_is_held_up_by_values_that_sum_to_it():
    asked = long_chain()
    smallest = smallest_budget(asked, "auto", time_limit_s=3.0)
    assert smallest.floor_bytes == least_need_bytes(asked)
    assert smallest.floor_bytes <= smallest.budget_bytes < 41
    there = holders(asked, smallest.schedule, smallest.trace)
    assert sum(one.size_bytes for one in there) == smallest.budget_bytes
    assert there == sorted(there, key=lambda one: -one.size_bytes)


def test_the_picture_of_a_front_has_units_and_all_solvers(front: Front):
    figure = front_figure(front)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "peak memory (B)"
    assert "% of the step" in axes.get_ylabel()
    labels = {line.get_label() for line in axes.get_lines()}
    assert {"plan", "smallest budget found"} <= labels
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    figure.draw_without_rendering()
    # The axes fill the figure but for labels and legend, and the label is not clipped.
    assert axes.get_position().width > 0.85
    assert axes.get_position().height > 0.7
    label = axes.yaxis.label.get_window_extent()
    assert 0 <= label.y0 < label.y1 <= figure.bbox.height


def plan(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["plan", *(str(word) for word in words)])


def test_the_command_sweeps_a_graph(tmp_path: Path):
    path = tmp_path / "graph.json"
    path.write_text(training_chain(SIZES))
    out, picture = tmp_path / "front.json", tmp_path / "front.png"
    words = ["--graph", path, "--sweep", "--time-limit", "2s", "--out", out, "--picture", picture]
    result = plan(*words)
    assert result.exit_code == 0, result.output
    table = result.stdout.splitlines()
    assert table[0].split("  ")[0] == "budget"
    assert len(table) == 13
    answer = json.loads(out.read_text())
    assert [point["budget_bytes"] for point in answer["points"]][-1] == answer["retained_all_peak_bytes"]
    assert answer["smallest_feasible_bytes"] == answer["points"][0]["budget_bytes"]
    assert "schedule" not in answer["points"][0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {one.name for one in tmp_path.iterdir()} == {"graph.json", "front.json", "front.png"}


def test_the_command_finds_the_smallest_budget_of_a_graph(tmp_path: Path):
    path = tmp_path / "graph.json"
    path.write_text(training_chain(SIZES))
    out = tmp_path / "schedule.json"
    result = plan("--graph", path, "--smallest", "--time-limit", "2s", "--json", "--out", out)
    answer = json.loads(result.stdout)
    assert answer["held_up_by"].startswith("node ")
    smallest = answer["smallest_feasible_bytes"]
    assert sum(one["size_bytes"] for one in answer["held_up_by_values"]) == smallest
    assert set(json.loads(out.read_text())) == set(range(len(read_bare_graph(path).graph.nodes)))
    assert "smallest budget" in plan("--graph", path, "--smallest", "--time-limit", "2s").stdout
