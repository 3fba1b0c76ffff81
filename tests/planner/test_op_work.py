"""What operations demand, from their shapes alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cost_models.work import Work
from planner.capture import capture


class Scores(nn.Module):
    """Attention whose mask may hide everything from a query, and whose dropout needs the scores in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.project(x)[:, None]
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.5)


def works_of(module: nn.Module, *shape: int) -> list[Work]:
    step = capture(module, (torch.randn(*shape), None), loss=lambda out, _: out.sum())
    return [work for node in step.graph.nodes for work in (node.work, *node.then)]


def test_a_softmax_that_looks_for_hidden_rows_moves_its_scores_four_times():
    (found,) = [work for work in works_of(Scores(), 2, 4, 8) if "_safe_softmax" in work.operation]
    # 2 x 1 x 4 x 4 scores of 4 B. Softmax reads and writes them; which are -inf: read, a byte each written; which
    # rows are whole: those bytes read; zeros there: scores read, and written.
    assert (found.read_bytes, found.written_bytes) == (32 * (4 + 4 + 1 + 4), 32 * (4 + 1 + 4))
    assert (found.flop, found.kind) == (32.0, "reduction")


def test_torch_makes_that_softmax_of_four_kernels():
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        torch.ops.aten._safe_softmax(torch.randn(4, 4), -1)
    kernels = ("aten::_softmax", "aten::isneginf", "aten::all", "aten::where")
    assert tuple(event.name for event in seen.events() if event.name in kernels) == kernels


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        torch.randn_like,
        lambda x: F.dropout(x, 0.1),
        lambda x: torch.bernoulli(x.sigmoid().detach()),
        lambda x: torch.empty_like(x).normal_(),
        lambda x: torch.empty_like(x).uniform_(),
        lambda x: torch.empty_like(x).exponential_(),
    ],
)
def test_what_draws_numbers_is_priced_by_how_many(draw):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale * draw(x)

    drawn = [work for work in works_of(Noisy(), 3, 16) if work.kind == "random"]
    assert [work.flop for work in drawn] == [48.0]
