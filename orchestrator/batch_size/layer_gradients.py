"""Squared norms of per-example gradients in closed form, from the inputs and output gradients of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orchestrator.batch_size.layer_formulas import LAYERS, UnsupportedLayerError
from planner.lower.trace import pytree

# B examples, T positions of one (tokens, pixels), O and I the dims of a weight


@dataclasses.dataclass
class _Outer:
    """One use of a parameter whose gradient is a sum of outer products, g = sum_t left_t right_t'.

    Attributes:
        left: shape [B, T, O], or indices of one-hot rows, int64 [B, T].
        right: shape [B, T, I].
    """

    left: Tensor
    right: Tensor


class LayerGradients(TorchFunctionMode):
    """Watches one forward and backward for every use of a parameter and computes norms from both sides of it.

    With x the input of a layer and e the gradient of the loss with respect to its output, example by example:

        linear          g = sum_t e_t x_t'         |g|^2 = sum_ts (e_t . e_s)(x_t . x_s), or of g itself
        convolution     the same; x_t is the patch that output pixel t reads, group by group of channels
        embedding       the same; e_t is one-hot, so |g|^2 = sum over pairs of tokens that are equal
        normalization   weight: g = sum_t e_t * xhat_t        bias of any layer: g = sum_t e_t

    Several uses of one parameter (tied weights) are one sum over the positions of all of them. Uses are found
    where torch's functions are called with the parameter, whether by a module or not; any that has no closed form
    is refused, and so is one whose input has not the batch as its dim 0.

    Args:
        parameters: that count.
        num_examples: B.

    Example:
        with layers: loss = step(inputs, targets); then backward, then layers.squares().
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_examples: int) -> None:
        super().__init__()
        self._parameters = parameters
        self._number_of = {parameter: number for number, parameter in enumerate(parameters)}
        self._num_examples = num_examples
        self._outer: dict[int, list[_Outer]] = {}
        self._whole: dict[int, list[Tensor]] = {}  # gradients of examples themselves, [B, ...]

    def squares(self) -> Tensor:
        """After the backward: squared norms of the gradients that the layers saw, float64, shape [B, P]."""
        device = self._parameters[0].device
        found = torch.zeros(self._num_examples, len(self._parameters), dtype=torch.float64, device=device)
        for number, pieces in self._whole.items():
            if number in self._outer:
                raise UnsupportedLayerError("a parameter is used as a matrix and as a factor or bias as well")
            found[:, number] = sum(pieces).flatten(1).double().square().sum(1)  # pyright: ignore[reportAttributeAccessIssue]
        for number, uses in self._outer.items():
            found[:, number] = _square_of_sum(uses, self._parameters[number])
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [
            leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not outputs or not torch.is_grad_enabled():
            return result
        used = [
            leaf
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf in self._number_of and leaf is not result
        ]
        if used:
            layer = LAYERS.get(func)
            name = getattr(func, "__name__", str(func))
            if layer is None:
                shapes = ", ".join(str(list(parameter.shape)) for parameter in used)
                raise UnsupportedLayerError(
                    f"{name} of a parameter of shape {shapes} has no closed form for per-example gradients here"
                )
            layer(self, result, *args, **kwargs)
        return result

    # What the layers below call.

    def batched(self, x: Tensor, name: str) -> Tensor:
        """x itself, if its dim 0 is the batch."""
        if x.ndim < 1 or x.shape[0] != self._num_examples:
            raise UnsupportedLayerError(
                f"the input of {name} has the shape {list(x.shape)}, without the batch of {self._num_examples} as "
                "its dim 0: gradients of single examples cannot be told apart there"
            )
        return x.detach()

    def outer(self, weight: Any, output: Tensor, pair: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """When the gradient of `output` comes: a gradient of outer products of pair(gradient)."""
        if weight is None or weight not in self._number_of:
            return
        pieces = self._outer.setdefault(self._number_of[weight], [])
        output.register_hook(lambda e: pieces.append(_Outer(*pair(e.detach()))))

    def whole(self, parameter: Any, output: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
        """When the gradient of `output` comes: gradients of examples themselves, shape [B, ...]."""
        if parameter is None or parameter not in self._number_of:
            return
        pieces = self._whole.setdefault(self._number_of[parameter], [])
        output.register_hook(lambda e: pieces.append(gradient(e.detach())))


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of each example, [B, T, D] and [B, S, D] -> [B, T, S]; 2-dim ones are one-hot."""
    if a.ndim == 2 and b.ndim == 2:
        return a[:, :, None] == b[:, None, :]
    if a.ndim == 2:
        return b.transpose(1, 2).gather(1, a[:, :, None].expand(-1, -1, b.shape[1]))
    if b.ndim == 2:
        return _gram(b, a).transpose(1, 2)
    return a @ b.transpose(1, 2)


def _square_of_sum(uses: list[_Outer], weight: Tensor) -> Tensor:
    """|sum over uses and positions of left right'|^2 of each example, shape [B]."""
    dense = all(use.left.ndim == 3 for use in uses)
    positions = sum(use.right.shape[1] for use in uses)
    rows, columns = uses[0].left.shape[-1], uses[0].right.shape[-1]
    if dense and rows * columns <= positions * (rows + columns):
        total = sum(use.left.transpose(1, 2) @ use.right for use in uses)
        assert isinstance(total, Tensor)
        return total.flatten(1).double().square().sum(1)
    found = torch.zeros(len(uses[0].right), dtype=torch.float64, device=weight.device)
    for one in uses:
        for other in uses:
            products = _gram(one.left, other.left) * _gram(one.right, other.right)
            found += products.flatten(1).sum(1, dtype=torch.float64)
    return found
