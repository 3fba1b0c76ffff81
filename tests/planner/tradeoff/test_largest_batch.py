"""The largest batch, and the scaling of a step that finds it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cost_models.hardware import load_hardware
from cost_models.roofline import Roofline
from orchestrator.cli import app
from planner.errors import InfeasibleError
from planner.inputs.strict import WorkloadError
from planner.inputs.workload import Workload
from planner.plan_file import Plan
from planner.prepare import prepare
from planner.prepared import Prepared
from planner.problem import Problem
from planner.solution import Status
from planner.solvers.materialization import Materialization
from planner.tradeoff.largest_batch import AllowedTime, _bisected, largest_batch
from planner.tradeoff.rebatched import batch_size_of, scaling, with_batch_size
from tests.graphs import chain, priced, problem
from tests.models import TinyGPT, token_loss

SIZES = (6, 1, 5, 2, 7, 1, 4, 3, 6, 2)
A100 = "a100-40gb"


def long_chain() -> Problem:
    return problem(priced(chain(SIZES)), 0, parameter_bytes=3)


def plan(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["plan", *(str(word) for word in words)])


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
    job = Path(__file__).resolve().parents[3] / "deploy" / "jobs" / "digits.yaml"
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
