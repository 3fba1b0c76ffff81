"""What each kind of layer gives to the gradients of single examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# B examples, T positions of one (tokens, pixels), e the gradient of the loss with respect to a layer's output


class UnsupportedLayerError(ValueError):
    """A parameter is used in a way that has no closed form here; the message names it."""


class Uses(Protocol):
    """Who takes in the uses of parameters; see `LayerGradients`."""

    def batched(self, x: Tensor, name: str) -> Tensor:
        """x itself, if its dim 0 is the batch."""
        ...

    def outer(self, weight: Any, output: Tensor, pair: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """When the gradient e of `output` comes: a gradient of outer products of pair(e)."""
        ...

    def whole(self, parameter: Any, output: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
        """When the gradient e of `output` comes: gradients of the examples themselves, shape [B, ...]."""
        ...


def _positions(x: Tensor) -> Tensor:
    """[B, ..., D] -> [B, T, D]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _linear(layers: Uses, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    x = layers.batched(x, "a linear layer")
    layers.outer(weight, output, lambda e: (_positions(e), _positions(x)))
    layers.whole(bias, output, lambda e: _positions(e).sum(1))


def _embedding(
    layers: Uses,
    output: Tensor,
    index: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:
    if padding_idx is not None or scale_grad_by_freq or sparse:
        raise UnsupportedLayerError(
            "an embedding with padding_idx, scale_grad_by_freq or sparse has none here"
        )
    index = layers.batched(index, "an embedding")
    flat = index.reshape(len(index), -1)
    layers.outer(weight, output, lambda e: (flat, e.reshape(*flat.shape, e.shape[-1])))


def _two_dims(value: int | Sequence[int], fill: int, *, num_dims: int) -> tuple[int, ...]:
    """A setting of a convolution over 1 or 2 dims as that of one over 2, the first of height 1."""
    given = (
        [value] * num_dims if isinstance(value, int) else list(value) * (num_dims if len(value) == 1 else 1)
    )
    return (fill, *given) if num_dims == 1 else tuple(given)


def _convolution(
    layers: Uses,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    num_dims: int,
) -> None:
    if isinstance(padding, str):
        raise UnsupportedLayerError(f"a convolution with padding={padding!r} has no closed form here")
    x = layers.batched(x, "a convolution")
    if x.ndim != num_dims + 2:
        raise UnsupportedLayerError("a convolution of one image without a batch has no closed form here")
    image = x.unsqueeze(2) if num_dims == 1 else x
    kernel = _two_dims(tuple(weight.shape[2:]), 1, num_dims=num_dims)
    options = {
        "dilation": _two_dims(dilation, 1, num_dims=num_dims),
        "padding": _two_dims(padding, 0, num_dims=num_dims),
        "stride": _two_dims(stride, 1, num_dims=num_dims),
    }

    def both_sides(e: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.unfold(image, kernel, **options)  # [B, I kernel, T]
        # A group of channels is a weight of its own: examples times groups stand beside one another.
        right = patches.reshape(len(x) * groups, -1, patches.shape[-1]).transpose(1, 2)
        left = e.reshape(len(x) * groups, -1, patches.shape[-1]).transpose(1, 2)
        return left, right

    if groups == 1:
        layers.outer(weight, output, both_sides)
    else:

        def gradient(e: Tensor) -> Tensor:
            left, right = both_sides(e)
            return (left.transpose(1, 2) @ right).reshape(len(x), -1)

        layers.whole(weight, output, gradient)
    layers.whole(bias, output, lambda e: e.flatten(2).sum(2))


def _layer_norm(
    layers: Uses,
    output: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    x = layers.batched(x, "layer norm")
    size = torch.Size(normalized_shape).numel()

    def total(y: Tensor) -> Tensor:
        return y.reshape(len(y), -1, size).sum(1)

    layers.whole(weight, output, lambda e: total(e * F.layer_norm(x, list(normalized_shape), eps=eps)))
    layers.whole(bias, output, total)


def _rms_norm(
    layers: Uses,
    output: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> None:
    x = layers.batched(x, "RMS norm")
    size = torch.Size(normalized_shape).numel()
    layers.whole(
        weight,
        output,
        lambda e: (e * F.rms_norm(x, list(normalized_shape), eps=eps)).reshape(len(x), -1, size).sum(1),
    )


def _group_norm(
    layers: Uses,
    output: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    x = layers.batched(x, "group norm")

    def total(y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:2], -1).sum(2)

    layers.whole(weight, output, lambda e: total(e * F.group_norm(x, num_groups, eps=eps)))
    layers.whole(bias, output, total)


def _batch_norm(
    layers: Uses,
    output: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training or running_mean is None or running_var is None:
        raise UnsupportedLayerError("batch norm couples the examples; freeze its statistics")
    x = layers.batched(x, "batch norm")
    mean, var = running_mean.clone(), running_var.clone()

    def total(y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:2], -1).sum(2)

    layers.whole(weight, output, lambda e: total(e * F.batch_norm(x, mean, var, eps=eps)))
    layers.whole(bias, output, total)


LAYERS: dict[Callable[..., Any], Callable[..., None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv1d: functools.partial(_convolution, num_dims=1),
    F.conv2d: functools.partial(_convolution, num_dims=2),
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
"""Torch's function -> what is known of the gradients of its parameters."""
