"""What the planner refuses, and the sentence that says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planner
from planner.problem import Budget
from tests.models import BatchNormNet, TinyGPT, token_loss


def tokens(batch: int = 2, length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 64, (batch, length)), torch.randint(0, 64, (batch, length))


def tiny_plan(**changes) -> planner.Plan:
    options = {"loss": token_loss, "budget": "none"} | changes
    return planner.plan(TinyGPT(layers=1), tokens(), **options)


def test_a_plan_for_other_parameters_names_the_first_that_differs():
    model = TinyGPT(layers=1)
    model.head = nn.Linear(16, 64, bias=False)
    with pytest.raises(
        planner.PlanMismatchError, match=r"another parameter.*head.weight: float32 \[64, 16\]"
    ):
        planner.apply(model, tiny_plan())


def test_another_batch_shape_or_dtype_is_named_at_the_call():
    planned = planner.apply(TinyGPT(layers=1), tiny_plan())
    with pytest.raises(
        planner.PlanMismatchError, match=r"plan has \[0\]: int64 \[2, 16\], here is .*int64 \[1, 16\]"
    ):
        planned(tokens(batch=1)[0])
    with pytest.raises(planner.PlanMismatchError, match="int32"):
        planned(tokens()[0].int())
    planned(tokens()[0])
    with pytest.raises(planner.PlanMismatchError, match="does not fit the plan"):
        planned(tokens(length=24)[0])


def test_a_plan_from_another_torch_is_refused():
    plan = tiny_plan()
    other = plan.model_copy(update={"signature": plan.signature.model_copy(update={"torch_version": "1.0"})})
    with pytest.raises(planner.PlanMismatchError, match=r"torch version: plan has 1\.0"):
        planner.apply(TinyGPT(layers=1), other)


def test_a_plan_for_a_model_that_computes_something_else_is_refused_at_the_first_call():
    class Twice(TinyGPT):
        def forward(self, tokens):
            return super().forward(tokens) * 2

    planned = planner.apply(Twice(layers=1), tiny_plan())
    with pytest.raises(planner.PlanMismatchError, match="another computation"):
        planned(tokens()[0])


def test_a_plan_made_in_eval_mode_does_not_run_in_training():
    model = BatchNormNet().eval()
    batch = (torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,)))
    planned = planner.apply(model, planner.plan(model, batch, loss=F.cross_entropy, budget="none"))
    planned.train()
    with pytest.raises(planner.PlanMismatchError, match="training"):
        planned(batch[0])


def test_an_infeasible_budget_names_the_smallest_that_works_and_that_one_works():
    with pytest.raises(planner.InfeasibleError, match="smallest budget found that works") as caught:
        tiny_plan(budget="1KiB")
    smallest = caught.value.smallest_feasible_bytes
    assert caught.value.owner in str(caught.value)
    plan = tiny_plan(budget=f"{smallest}B")
    assert plan.predicted_peak_bytes <= smallest


def test_data_dependent_control_flow_names_the_line():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            if y.sum() > 0:  # the line to name
                return y
            return -y

    with pytest.raises(planner.CaptureError, match=r"test_refusals.py:\d+ \(if y.sum\(\) > 0.*torch.where"):
        planner.plan(Branches(), (torch.zeros(2, 4), torch.zeros(2, 4)), loss=F.mse_loss, budget="none")


def test_a_model_without_trainable_parameters_is_refused():
    model = TinyGPT(layers=1).requires_grad_(False)
    with pytest.raises(planner.CaptureError, match="nothing to train"):
        planner.plan(model, tokens(), loss=token_loss, budget="none")


def test_a_loss_that_is_not_a_scalar_is_refused():
    with pytest.raises(planner.CaptureError, match="one scalar"):
        tiny_plan(loss=lambda out, target: out)
    with pytest.raises(planner.CaptureError, match="must return its loss"):
        planner.plan(TinyGPT(layers=1), tokens()[0], budget="none")


def test_a_batch_that_is_no_pair_is_refused():
    with pytest.raises(planner.CaptureError, match="pair"):
        planner.plan(TinyGPT(layers=1), tokens()[0], loss=token_loss, budget="none")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("4", "unit"),
        ("-1GiB", "-1GiB"),
        ("0%", "more than 0"),
        ("50 % of everything", "50% of activations"),
        ("many", "many"),
        ("0B", "more than 0 bytes"),
    ],
)
def test_a_malformed_budget_says_what_was_got(text: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        Budget.parse(text)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": 2}', "not json", '{"format": 1, "graph_hash": 3}']
)
def test_a_file_that_is_no_plan_is_refused_in_one_sentence(text: str, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a plan"):
        planner.Plan.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        planner.Plan.load(tmp_path / "missing.json")


def test_a_plan_survives_its_json(tmp_path):
    plan = tiny_plan(budget="90% of activations")
    plan.save(tmp_path / "plan.json")
    assert planner.Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["1e400GiB", "1e999999999GiB", "9" * 400 + "%", "9" * 5000 + "GiB", "16EiB"])
def test_a_budget_beyond_all_memory_is_refused(text: str):
    with pytest.raises(ValueError, match=r"too large|less than|unit"):
        Budget.parse(text)


def test_sparse_gradients_and_lazy_parameters_are_refused_in_a_sentence():
    embedding = nn.Embedding(8, 4, sparse=True)
    with pytest.raises(planner.CaptureError, match="sparse"):
        planner.plan(
            embedding, (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4)), loss=F.mse_loss, budget="none"
        )
    with pytest.raises(planner.CaptureError, match="lazy"):
        planner.plan(nn.LazyLinear(3), (torch.zeros(2, 4), torch.zeros(2, 3)), loss=F.mse_loss, budget="none")


def test_an_optimizer_that_needs_a_closure_is_refused_in_a_sentence():
    with pytest.raises(planner.CaptureError, match="LBFGS"):
        tiny_plan(optimizer=lambda module: torch.optim.LBFGS(module.parameters()))
