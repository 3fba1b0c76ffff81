"""Checks of a plan beside eager: what is compared, what is corrected, what is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import planner
from orchestrator.cli import app
from planner.checking.calibrated import calibrated_plan
from planner.checking.check import beside_eager, check
from planner.checking.compare import equal_bits, first_difference
from planner.checking.node_times import with_measured_times
from planner.checking.real_step import Left, RealStep, interleaved
from planner.inputs.workload import SolverSpec
from planner.lower.executor import marked_boxed
from planner.lower.module import PlannedModule
from planner.lower.out_of_memory import StepOutOfMemoryError
from planner.measure import threads
from planner.prepare import prepare
from tests.models import TinyGPT, token_loss

SOLVER = SolverSpec(time_limit="5s")


def tokens(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 64, (rows, 48)), torch.randint(0, 64, (rows, 48))


def left(**changes: Any) -> Left:
    zero = torch.zeros(2)
    return Left(**({"outputs": {}, "loss": zero, "gradients": {"a": zero, "b": None}, "buffers": {"c": zero},
                    "random_state": zero, "peak_bytes": 0} | changes))  # fmt: skip


def test_every_kind_of_difference_is_found_and_named():
    other = torch.tensor([0.0, 1e-45])
    assert first_difference(left(), left()) == {"outputs": "", "gradients": "", "buffers": ""}
    for changes, kind, name in (
        ({"loss": other}, "outputs", "the loss"),
        ({"gradients": {"a": other, "b": None}}, "gradients", "a"),
        ({"gradients": {"a": torch.zeros(2), "b": torch.zeros(2)}}, "gradients", "b"),
        ({"gradients": {"a": torch.zeros(2)}}, "gradients", "b"),
        ({"buffers": {"c": other}}, "buffers", "c"),
        ({"random_state": other}, "buffers", "the random generator"),
    ):
        found = first_difference(left(), left(**changes))
        assert {key: value for key, value in found.items() if value} == {kind: name}


def test_equal_bits_wants_dtype_shape_and_values_and_takes_nan_for_nan():
    nan = torch.tensor([float("nan"), 1.0])
    assert equal_bits(nan, nan.clone())
    assert not equal_bits(nan, torch.tensor([2.0, 1.0]))
    assert not equal_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not equal_bits(torch.zeros(2), torch.zeros(1, 2))


def test_a_prediction_that_is_too_low_is_corrected_until_the_measured_step_fits():
    torch.manual_seed(0)
    model, batch = TinyGPT(), tokens()
    prepared = prepare(model, batch, loss=token_loss)
    missing = 20_000  # as if the batch had been forgotten, and more
    static = dataclasses.replace(
        prepared.problem.static, parameter_bytes=prepared.problem.static.parameter_bytes - missing
    )
    wrong = prepared.with_problem(dataclasses.replace(prepared.problem, static=static))
    budget_bytes = int(0.7 * prepared.retained_all.peak_bytes)
    found = calibrated_plan(
        wrong, model, RealStep(*batch, loss=token_loss), budget=f"{budget_bytes}B", solver=SOLVER
    )
    assert found.rounds == 2
    assert found.unexplained_bytes == missing
    assert found.measured_peak_bytes == found.plan.predicted_peak_bytes <= budget_bytes


def test_measured_times_price_every_operation_and_say_so():
    torch.manual_seed(0)
    model, batch = TinyGPT(), tokens()
    step = RealStep(*batch, loss=token_loss)
    prepared = prepare(model, batch, loss=token_loss)
    measured = with_measured_times(prepared, model, step, steps=2)
    assert measured.problem.costed.graph is prepared.problem.costed.graph
    assert all(t > 0 for t in measured.problem.costed.time_s)
    found = check(measured, model, step, budget="60%", solver=SOLVER, rounds=1, measure_times=False)
    assert found.is_exact
    assert found.is_within_budget
    assert found.plan.provenance.cost_model == "measured"
    assert found.plan.num_rematerialized > 0
    assert found.eager_peak_bytes > found.measured_peak_bytes
    assert found.eager_cpu_s > 0 < found.planned_cpu_s


class Counting(nn.Module):
    """Its outputs depend on how often it was called, which a trace freezes: no planned step can be eager's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * float(self.calls)


def test_a_step_that_is_not_eagers_is_found():
    model, x = Counting(), torch.randn(4, 8)
    step = RealStep(x, loss=lambda outputs, _: outputs.sum())
    prepared = prepare(model, (x, None), loss=step.loss)
    planned = calibrated_plan(prepared, model, step, budget="none", solver=SOLVER)
    model.calls = 7  # eager goes on from here
    found = beside_eager(planned, model, step, rounds=1)
    assert found.different["outputs"] == "the loss"
    assert found.different["gradients"] == "linear.weight"
    assert not found.is_exact


def test_timing_takes_at_least_one_round():
    with pytest.raises(ValueError, match="at least one round, got 0"):
        interleaved({}, rounds=0)


def test_out_of_memory_says_what_was_promised_and_what_to_ask_for():
    model, batch = TinyGPT(layers=1), tokens()
    plan = planner.plan(model, batch, loss=token_loss, budget="none")

    def starved(half: Any, example_inputs: Any) -> Any:
        def run(arguments: list[Any]) -> Any:
            raise torch.OutOfMemoryError("nothing left")

        return marked_boxed(run)

    with pytest.raises(
        StepOutOfMemoryError, match=rf"in spite of the plan.*{plan.peak_owner}.*budget of"
    ) as caught:
        PlannedModule(model, plan, executor=starved)(batch[0])
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert caught.value.predicted_peak_bytes == plan.predicted_peak_bytes
    assert 0 < caught.value.budget_to_ask_for_bytes < plan.predicted_peak_bytes


JOB = """
name: tiny
model: {target: tests.models:TinyGPT, kwargs: {dropout: 0.1}}
batch:
  inputs: {shape: [4, 48], dtype: int64, high: 64}
  targets: {shape: [4, 48], dtype: int64, high: 64}
loss: tests.models:token_loss
optimizer: {name: adamw, lr: 0.001}
"""
KEYS = (
    "outputs_equal gradients_equal buffers_equal budget_bytes predicted_peak_bytes measured_peak_bytes "
    "eager_peak_bytes eager_cpu_s planned_cpu_s extra_time_fraction"
)


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return str(path)


def test_the_command_prints_what_is_equal_the_peaks_and_the_times(job: str, tmp_path: Path):
    out = tmp_path / "plan.json"
    done = CliRunner().invoke(
        app, ["check", job, "--budget", "80%", "--rounds", "1", "--json", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(KEYS.split()) <= set(found)
    assert found["outputs_equal"] is found["gradients_equal"] is found["buffers_equal"] is True
    assert found["measured_peak_bytes"] <= found["budget_bytes"] < found["eager_peak_bytes"]
    assert planner.Plan.load(out).predicted_peak_bytes == found["predicted_peak_bytes"]


def test_a_check_runs_on_the_threads_that_the_rank_was_planned_with():
    # Gradients of convolutions take workspace for each thread; a rank of this job has one.
    job = Path(__file__).parents[2] / "deploy" / "jobs" / "digits.yaml"
    with threads(2):
        done = CliRunner().invoke(app, ["check", str(job), "--budget", "88%", "--rounds", "1", "--json"])
        assert torch.get_num_threads() == 2
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured_peak_bytes"] == found["predicted_peak_bytes"]


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--budget", "1KB"], 1, "the smallest budget found that works"),
        (["--budget", "60"], 2, "unit"),
        (["--rounds", "0"], 2, "rounds"),
        (["--solver", "magic"], 2, "magic"),
    ],
)
def test_the_command_refuses_in_a_sentence(job: str, options: list[str], status: int, sentence: str):
    done = CliRunner().invoke(app, ["check", job, *options])
    assert done.exit_code == status
    assert sentence in done.output
    assert "Traceback" not in done.output
