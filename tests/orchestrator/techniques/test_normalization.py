"""Batch norm found and replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.techniques.normalization import batch_norm_of, with_group_norm


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(48))
    )


def test_the_first_layer_that_looks_at_the_batch_is_named():
    assert batch_norm_of(net()) == "1"
    assert batch_norm_of(nn.BatchNorm1d(4)) == "BatchNorm1d"
    assert batch_norm_of(net().eval()) == ""
    assert batch_norm_of(nn.Sequential(nn.GroupNorm(2, 4))) == ""


def test_group_norm_takes_over_gain_and_bias_and_does_not_look_at_the_batch():
    model = net()
    gain = model[1].weight  # type: ignore[index]
    changed = with_group_norm(model)
    assert batch_norm_of(changed) == ""
    assert changed[1].weight is gain  # type: ignore[index]
    # 48 channels: the largest divisor that 32 groups and 48 channels share is 16.
    assert changed[1].num_groups == 16  # type: ignore[index]
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(changed(images)[:1], changed(images[:1]))


def test_a_model_that_is_a_batch_norm_becomes_a_group_norm():
    assert isinstance(with_group_norm(nn.BatchNorm2d(8, affine=False)), nn.GroupNorm)


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        with_group_norm(net(), groups=0)
