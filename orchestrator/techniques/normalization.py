"""Batch norm in small micro-batches: found, replaced by group norm, or synchronized over the ranks."""

from __future__ import annotations

import math

from torch import nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ALL_BATCH_NORMS = (*_BATCH_NORMS, nn.SyncBatchNorm)
# Wu and He, 2018, found 32 groups, or 16 channels in each, to be as good as any other number.
_GROUPS = 32


def batch_norm_of(model: nn.Module) -> str:
    """Qualified name of the first layer that takes statistics of the micro-batch of one rank; "" for none.

    Synchronized batch norm takes them of all ranks and is none of these.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS) and module.training:
            return name or type(module).__name__
    return ""


def with_group_norm(model: nn.Module, *, groups: int = _GROUPS) -> nn.Module:
    """The model with every batch norm replaced by a group norm over the same channels, in place.

    Group norm takes its statistics of one sample, so that the size of the micro-batch does not matter. Gain and
    bias are taken over; running statistics are dropped.

    Args:
        model: changed in place.
        groups: of channels, at most; a layer whose channels it does not divide gets the largest number that does.

    Returns:
        The model, or a group norm where the model was itself a batch norm.

    Raises:
        ValueError: groups < 1.

    Reference: Wu and He, 2018, arXiv 1803.08494.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if isinstance(model, _BATCH_NORMS):
        return _group_norm(model, groups)
    for name, child in model.named_children():
        setattr(model, name, with_group_norm(child, groups=groups))
    return model


def _group_norm(norm: nn.Module, groups: int) -> nn.GroupNorm:
    assert isinstance(norm, _BATCH_NORMS)
    made = nn.GroupNorm(
        math.gcd(groups, norm.num_features), norm.num_features, eps=norm.eps, affine=norm.affine
    )
    if norm.affine:
        made.weight, made.bias = norm.weight, norm.bias
    return made.train(norm.training)


def with_sync_batch_norm(model: nn.Module) -> nn.Module:
    """The model with statistics of batch norm taken over all ranks; torch's own, on CUDA only."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
