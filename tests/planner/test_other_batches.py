"""Batches of other sizes than the plan's."""

from __future__ import annotations

import copy

import pytest
import torch

import planner
from planner.checking.compare import first_difference
from planner.lower.other_batch import bytes_of, only_sizes_differ
from tests.models import TinyGPT, token_loss
from tests.planner.steps import EQUAL, left_of


def tokens(rows: int, length: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 64, (rows, length)), torch.randint(0, 64, (rows, length))


def test_a_smaller_batch_runs_the_same_schedule_within_the_budget_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
):
    torch.manual_seed(0)
    model = TinyGPT(dropout=0.1)
    plan = planner.plan(model, tokens(8), loss=token_loss, budget="60% of activations")
    planned = planner.apply(copy.deepcopy(model), plan)
    eager = copy.deepcopy(model)
    for rows in (8, 3, 8, 3, 1):
        batch = tokens(rows)
        left = left_of(planned, batch, token_loss, steps=1)
        assert left.peak_bytes <= plan.budget_bytes
        assert first_difference(left_of(eager, batch, token_loss, steps=1), left) == EQUAL
    said = [record.message for record in caplog.records if "other sizes" in record.message]
    assert len(said) == 2  # for 3 and for 1
    assert "int64 [3, 48] in place of [0]: int64 [8, 48]" in said[0]


def test_a_larger_batch_is_planned_anew_where_the_loss_lies_inside(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    module = planner.StepModule(TinyGPT(), token_loss)
    plan = planner.plan(module, tokens(4), budget="90%")
    planned, eager = planner.apply(copy.deepcopy(module), plan), copy.deepcopy(module)
    for rows in (4, 5):
        batch = (tokens(rows), None)
        got = left_of(planned, batch, lambda loss, _: loss, steps=1)
        assert first_difference(left_of(eager, batch, lambda loss, _: loss, steps=1), got) == EQUAL
        assert got.peak_bytes <= plan.budget_bytes
    assert "planned anew within the budget" in caplog.text


def test_a_batch_that_fits_no_plan_within_the_budget_is_refused():
    module = planner.StepModule(TinyGPT(), token_loss)
    planned = planner.apply(module, planner.plan(module, tokens(4), budget="60% of activations"))
    planned(*tokens(4))
    with pytest.raises(planner.InfeasibleError):
        planned(*tokens(64))


def test_a_larger_batch_without_its_loss_is_refused_and_named():
    model = TinyGPT()
    planned = planner.apply(model, planner.plan(model, tokens(4), loss=token_loss, budget="none"))
    planned(tokens(4)[0])
    with pytest.raises(planner.PlanMismatchError, match=r"does not fit the plan: .* more bytes than planned"):
        planned(tokens(5)[0])


def test_words_of_inputs_tell_sizes_from_kinds():
    assert only_sizes_differ(("[0]: float32 [8, 3]", "[1]: True"), ("[0]: float32 [2, 3]", "[1]: True"))
    assert not only_sizes_differ(("[0]: float32 [8, 3]",), ("[0]: float32 [8]",))
    assert not only_sizes_differ(("[0]: float32 [8]",), ("[0]: float32 [8] (gradient asked)",))
    assert not only_sizes_differ(("[1]: True",), ("[1]: False",))
    assert bytes_of(("[0]: bfloat16 [8, 3]", "[1]: True", "[2]: int64 []")) == 8 * 3 * 2 + 8
