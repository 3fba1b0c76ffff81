"""A step by torch's operations on lists of tensors: few launches on a GPU, the same on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from orchestrator.optim.fast.items import Item, reduce_squares
from orchestrator.optim.fast.rules import AdamRule, LarsRule, Scalar

BUCKET_BYTES = 32 << 20
_PIECE = 1 << 14  # elements


def step(items: Sequence[Item]) -> None:
    """Make the steps of some tensors, bucket by bucket.

    A bucket holds tensors of one rule, device and dtype: 32 MiB, or one tensor that is larger. A step allocates
    one list as large as its bucket (LARS: none), two while gradients are centralized, and gives it back.
    """
    for bucket in _buckets(items):
        rule = bucket[0].rule
        if isinstance(rule, AdamRule):
            _adam(bucket, rule)
        else:
            _lars(bucket, rule)


def _buckets(items: Sequence[Item]) -> Iterator[list[Item]]:
    alike: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        key = (id(item.rule), item.weight.device, item.weight.dtype, bool(item.row))
        alike.setdefault(key, []).append(item)
    for some in alike.values():
        bucket: list[Item] = []
        size = 0
        for item in some:
            if bucket and size + item.weight.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(item)
            size += item.weight.nbytes
        if bucket:
            yield bucket


def synchronize(pairs: Sequence[tuple[Tensor, Tensor]], slow_step: float) -> None:
    """slow <- slow + slow_step (w - slow), w <- slow, for some pairs (w, slow) of one dtype; allocates nothing."""
    on_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for weight, slow in pairs:
        weights, slows = on_device.setdefault(weight.device, ([], []))
        weights.append(weight)
        slows.append(slow)
    for weights, slows in on_device.values():
        torch._foreach_lerp_(slows, weights, slow_step)
        torch._foreach_copy_(weights, slows)


def _adam(items: Sequence[Item], rule: AdamRule) -> None:
    weights = [item.weight for item in items]
    gradients = [item.gradient for item in items]
    moments = [cast(Tensor, item.first) for item in items]
    squares = [cast(Tensor, item.second) for item in items]
    if items[0].row:
        gradients = [
            g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g for g in gradients
        ]
    torch._foreach_mul_(moments, rule.beta1)
    torch._foreach_add_(moments, gradients, alpha=rule.gradient1)
    torch._foreach_mul_(squares, rule.beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, rule.gradient2)
    del gradients

    rate: Scalar | Tensor = rule.rate
    if rule.is_adapted:
        x = _along(moments, squares, rule, rule.normed_direction, rule.normed_moment)
        _add(x, weights, rule.normed_weight)
        rate = _adam_ratio(items, weights, x, rule) * rule.rate
        normed = (rule.normed_direction, rule.normed_moment, rule.normed_weight)
        if normed != (rule.direction, rule.moment, rule.weight):
            del x
            x = _along(moments, squares, rule, rule.direction, rule.moment)
            _add(x, weights, rule.weight)
    else:
        x = _along(moments, squares, rule, rule.direction, rule.moment)
        _add(x, weights, rule.weight)
    _multiply(weights, rule.keep)
    _subtract(weights, x, rate)
    if rule.slow_step:
        synchronize([(item.weight, cast(Tensor, item.slow)) for item in items], rule.slow_step)


def _along(
    moments: list[Tensor], squares: list[Tensor], rule: AdamRule, direction: Scalar, moment: Scalar
) -> list[Tensor]:
    """direction m / (scale sqrt(v) + offset), or moment m, in new tensors."""
    if _is_zero(direction):
        return list(torch._foreach_mul(moments, cast(Any, moment)))
    x = list(torch._foreach_sqrt(squares))
    torch._foreach_mul_(x, rule.scale)
    torch._foreach_add_(x, rule.offset)
    torch._foreach_reciprocal_(x)
    torch._foreach_mul_(x, moments)
    _multiply(x, direction)
    return x


def _lars(items: Sequence[Item], rule: LarsRule) -> None:
    weights, gradients = [item.weight for item in items], [item.gradient for item in items]
    ratio: Tensor | float = 1.0
    if rule.is_adapted:
        weight_norm, gradient_norm = _norms(items, weights, gradients).unbind(1)
        ratio = rule.trust * weight_norm / (gradient_norm + rule.decay * weight_norm)
        ratio = torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
    if rule.momentum:
        buffers = [cast(Tensor, item.first) for item in items]
        torch._foreach_mul_(buffers, rule.momentum)
        _subtract(buffers, gradients, -(ratio * rule.term) * rule.sign)
        if rule.decay:
            _subtract(buffers, weights, -(ratio * rule.term) * rule.decay)
    if not _is_zero(rule.along_term):
        # The decay reads the weights before the gradients move them.
        if rule.decay:
            _multiply(weights, 1 - ratio * rule.along_term * rule.decay)
        _subtract(weights, gradients, ratio * rule.along_term * rule.sign)
    if rule.momentum:
        _subtract(weights, [cast(Tensor, item.first) for item in items], rule.along_buffer)


def _norms(items: Sequence[Item], left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The norms of two lists of tensors, (tensors, 2); over all ranks where they are sharded."""
    squares = torch.stack([_squares(left), _squares(right)], dim=1)
    if any(item.groups for item in items):
        reduce_squares(squares, items)
    return squares.sqrt()


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each, in double precision: how a tensor is cut into shards then does not show.

    Only CUDA's kernel reads single precision as it adds up; elsewhere torch makes a copy first, so one of a piece.
    """
    kind = tensors[0].device.type
    dtype = torch.float32 if kind == "mps" else torch.float64
    if kind == "cuda":
        return torch.stack(torch._foreach_norm(list(tensors), 2, dtype)).square()
    each = (tensor.as_strided((tensor.numel(),), (1,)).split(_PIECE) for tensor in tensors)
    return torch.stack([torch.stack(torch._foreach_norm(list(p), 2, dtype)).square().sum() for p in each])


def _adam_ratio(
    items: Sequence[Item], weights: Sequence[Tensor], x: Sequence[Tensor], rule: AdamRule
) -> Tensor:
    weight_norm, x_norm = _norms(items, weights, x).unbind(1)
    weight_norm = (weight_norm * rule.norm_scale).clamp(max=rule.largest_norm)
    return torch.where((weight_norm > 0) & (x_norm > 0), weight_norm / x_norm, 1.0)


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _multiply(tensors: Sequence[Tensor], factor: Scalar | Tensor) -> None:
    """Multiply by a number, by a 0-dim tensor, or each by its element of a vector; in place."""
    if isinstance(factor, Tensor) and factor.ndim:
        torch._foreach_mul_(list(tensors), list(factor.to(tensors[0].dtype).unbind()))
    elif isinstance(factor, Tensor) or factor != 1:
        torch._foreach_mul_(list(tensors), cast(Any, factor))


def _add(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Scalar) -> None:
    """tensors <- tensors + factor others, in place."""
    _subtract(tensors, others, -factor)


def _subtract(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Scalar | Tensor) -> None:
    """tensors <- tensors - factor others, in place; factor as in `_multiply`."""
    if isinstance(factor, Tensor):
        each = (-factor.to(tensors[0].dtype)).expand(len(tensors)).unbind()
        for tensor, other, one in zip(tensors, others, each):
            tensor.addcmul_(other, one)
    elif factor:
        torch._foreach_add_(list(tensors), list(others), alpha=-factor)
