"""A step that is traced on the processor for a GPU has attention as one kernel there, dropout or not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planner.capture import capture
from planner.capturing.fused_attention import FusedAttention


class Attends(nn.Module):
    """One layer of attention, its dropout given by name or by position."""

    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.by_name = by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, tokens, 16) -> (batch, 2, tokens, 8)."""
        q, k, v = self.qkv(x).view(2, 32, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.by_name:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, None, 0.1, True)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_with_dropout_keeps_its_scores_only_where_it_is_not_one_kernel(
    by_name: bool, is_fused: bool
):
    model = Attends(by_name=by_name)
    with FusedAttention() if is_fused else nullcontext():
        captured = capture(
            model, (torch.randn(2, 32, 16), None), loss=lambda outputs, targets: outputs.square().mean()
        )
    ops = [node.op for node in captured.graph.nodes]
    scores_bytes = 4 * 2 * 2 * 32 * 32
    assert any("scaled_dot_product" in op for op in ops) == is_fused
    assert any("softmax" in op for op in ops) != is_fused
    assert any(value.size_bytes == scores_bytes for value in captured.graph.values) != is_fused
