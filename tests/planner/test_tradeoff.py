"""Sweeps, the smallest budget, the largest batch."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cost_models.hardware import load_hardware
from cost_models.roofline import Roofline
from orchestrator.cli import app
from planner.bare_graph import read_bare_graph
from planner.errors import InfeasibleError, SolverError
from planner.inputs.strict import WorkloadError
from planner.inputs.workload import Workload
from planner.pipeline import prepare
from planner.plan_file import Plan
from planner.prepared import Prepared
from planner.problem import Problem
from planner.report.front_plot import front_figure
from planner.residency import holders
from planner.simulate import simulate
from planner.solution import Status
from planner.solvers.bounds import least_need_bytes
from planner.solvers.materialization import Materialization
from planner.tradeoff.largest_batch import AllowedTime, _bisected, largest_batch
from planner.tradeoff.rebatched import batch_size_of, scaling, with_batch_size
from planner.tradeoff.smallest import smallest_budget
from planner.tradeoff.sweep import Front, budgets_between, sweep
from planner.tradeoff.workers import Outcome, Task, run_tasks
from tests.graphs import chain, priced, problem
from tests.models import TinyGPT, token_loss
from tests.planner.test_plan_command import training_chain

SIZES = (6, 1, 5, 2, 7, 1, 4, 3, 6, 2)
A100 = "a100-40gb"


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
        trace = simulate(long_chain(), point.schedule)
        assert trace.peak_bytes == point.peak_bytes <= point.budget_bytes
        assert trace.time_s == pytest.approx(20.0 * (1.0 + (point.extra_time_fraction or 0.0)))


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
    (axes,) = front_figure(front).axes
    assert axes.get_xlabel() == "peak memory (B)"
    assert "% of the step" in axes.get_ylabel()
    labels = {line.get_label() for line in axes.get_lines()}
    assert {"plan", "smallest budget found"} <= labels
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0


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
    result = plan(*words)
    assert result.exit_code == 2
    assert expected in result.stderr


@pytest.mark.parametrize("text", ["10", "-3%", "backward", "1e9%", ""])
def test_a_malformed_extra_time_says_what_was_got(text: str):
    with pytest.raises(ValueError, match="'10%', or be 'forward'"):
        AllowedTime.parse(text)


def test_one_forward_is_the_seconds_of_its_nodes():
    # Ten forward nodes of one second each, ten backward ones.
    assert AllowedTime.parse("forward").allowed_s(long_chain()) == 10.0
    assert AllowedTime.parse("25%").allowed_s(long_chain()) == 5.0


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 8, 9, 100, 1023])
@pytest.mark.parametrize("first", [1, 8, 50])
def test_bisection_finds_the_largest_size_from_any_start(largest: int, first: int):
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= largest

    assert _bisected(fits, first) == largest
    assert largest + 1 in tried
    assert len(tried) <= 25
    assert _bisected(fits, first, step=1) == largest


def test_a_size_without_end_is_refused():
    with pytest.raises(ValueError, match="Is dim 0 of the batch the samples"):
        _bisected(lambda _: True, 1)


def prepared_gpt(size: int) -> Prepared[Plan]:
    tokens = torch.randint(0, 64, (size, 32))
    return prepare(TinyGPT(layers=2), (tokens, tokens), loss=token_loss, hardware=A100)


def test_bytes_scale_exactly_from_two_captures_to_a_third():
    cost_model = Roofline(load_hardware(A100))
    two, four, seven = (prepared_gpt(size).problem for size in (2, 4, 7))
    scaled = scaling(two, four, sizes=(2, 4), cost_model=cost_model)
    assert scaled is not None
    assert [v.size_bytes for v in scaled(7).costed.graph.values] == [
        v.size_bytes for v in seven.costed.graph.values
    ]
    assert scaled(7).costed.time_s == pytest.approx(seven.costed.time_s)
    assert scaled(7).static == seven.static


def test_graphs_of_other_structure_do_not_scale():
    one = prepared_gpt(2).problem
    assert scaling(one, long_chain(), sizes=(2, 4), cost_model=Roofline(load_hardware(A100))) is None


def test_the_largest_batch_fits_and_one_more_does_not():
    found = largest_batch(
        prepared_gpt, size=4, budget="4MiB", allowed=AllowedTime.parse("forward"),
        cost_model=Roofline(load_hardware(A100)), solver="materialization", time_limit_s=3.0,
    )  # fmt: skip
    assert found.scaled
    assert found.num_captures <= 4
    assert found.plan.predicted_peak_bytes <= 4 << 20
    assert found.refused.size == found.size + 1
    assert found.refused.reason
    more = dataclasses.replace(prepared_gpt(found.size + 1).problem, budget_bytes=4 << 20)
    solution = Materialization(time_limit_s=5.0).solve(more)
    if solution.schedule is not None:
        allowed_s = AllowedTime.parse("forward").allowed_s(more)
        assert solution.time_s - more.costed.step_s > allowed_s
    else:
        assert solution.status in (Status.INFEASIBLE, Status.NOT_FOUND)


def test_less_extra_time_never_allows_a_larger_batch():
    def size(extra: str) -> int:
        return largest_batch(
            prepared_gpt, size=2, budget="3MiB", allowed=AllowedTime.parse(extra),
            cost_model=Roofline(load_hardware(A100)), solver="materialization", time_limit_s=3.0,
        ).size  # fmt: skip

    assert size("0%") <= size("5%") <= size("forward")


def test_a_budget_below_one_sample_is_an_answer():
    with pytest.raises(InfeasibleError, match="smallest budget found that works"):
        largest_batch(
            prepared_gpt, size=2, budget="100KiB", allowed=AllowedTime.parse("10%"),
            cost_model=Roofline(load_hardware(A100)), solver="auto", time_limit_s=2.0,
        )  # fmt: skip


def workload(batch: Any) -> Workload:
    return Workload.from_data(
        {"name": "x", "model": "torch.nn:Identity", "batch": batch, "optimizer": {"name": "sgd"},
         "loss": "torch.nn.functional:mse_loss"}, folder=Path(), source="test",
    )  # fmt: skip


def test_a_batch_changes_dim_0_where_it_counts_samples():
    job = workload({"inputs": {"x": {"shape": [4, 8]}, "mask": {"shape": [8, 8]}}, "targets": {"shape": [4]}})
    assert batch_size_of(job) == 4
    batch: Any = with_batch_size(job, 7).batch
    assert batch.inputs["x"].shape == (7, 8)
    assert batch.inputs["mask"].shape == (8, 8)
    assert batch.targets.shape == (7,)


def test_a_callable_batch_is_called_with_another_size():
    job = workload({"target": "some:batch", "kwargs": {"batch_size": 3, "length": 9}})
    batch: Any = with_batch_size(job, 5).batch
    assert batch.kwargs == {"batch_size": 5, "length": 9}
    with pytest.raises(WorkloadError, match="none of its kwargs is called batch or batch_size"):
        batch_size_of(workload("some:batch"))


def test_the_command_finds_the_largest_batch_of_a_job(tmp_path: Path):
    job = Path(__file__).resolve().parents[2] / "deploy" / "jobs" / "digits.yaml"
    if not job.exists():
        pytest.skip("the recipe is not there")
    words = ["--budget", "4MiB", "--hardware", A100, "--extra-time", "20%", "--time-limit", "3s", "--json"]
    pytest.importorskip("sklearn")
    answer = json.loads(plan(job, "--max-batch", *words).stdout)
    assert answer["peak_bytes"] <= 4 << 20
    assert answer["extra_time_fraction"] <= 0.2
    assert answer["refused_batch"] == answer["largest_batch"] + 1
    refused = plan(job, "--max-batch", "--budget", "50%")
    assert refused.exit_code == 2
    assert "budget in bytes" in refused.stderr
