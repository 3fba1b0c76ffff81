"""Outputs that the loss does not read: parameters behind them alone get no gradient, as in eager mode.

AOTAutograd takes zeros for the gradient of such an output, and so gives gradients of zeros: weight decay and
momentum would move parameters that eager leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from planner.capturing.joint_reader import ancestors
from planner.capturing.reading import OutputRole, Reading

# Position of a parameter -> numbers of the outputs whose gradients its own is made of.
Needs = Mapping[int, frozenset[int]]


def needs_of(reading: Reading, num_parameters: int) -> Needs:
    """The parameters whose gradient does not depend on every output that has one.

    Args:
        reading: a model's joint graph.
        num_parameters: its first inputs, in order.

    Returns:
        Numbers as in `Traced.tangents`; nothing where all depend on all.
    """
    tangents = reading.traced.tangents
    every = frozenset(tangents.values())
    gradients = [f.node for f in reading.traced.outputs if f.role is OutputRole.GRADIENT]
    found: dict[int, frozenset[int]] = {}
    for position, node in enumerate(gradients[:num_parameters]):
        if node is not None:
            needs = frozenset(tangents[t] for t in ancestors([node]) if t in tangents)
            if needs and needs != every:
                found[position] = needs
    return found


def without_unread(run: Callable[..., Any], reading: Reading, num_parameters: int) -> Callable[..., Any]:
    """A compiled step that gives parameters no gradient where none came for the outputs that they are behind.

    Args:
        run: takes parameters, buffers, and inputs.
        reading: the joint graph that it was compiled from.
        num_parameters: the first ones that it takes.
    """
    needs = needs_of(reading, num_parameters)
    if not needs:
        return run
    positions, numbers = tuple(needs), _numbers_of(reading)

    def call(*tensors: Any, **kwargs: Any) -> Any:
        came: set[int] = set()
        given = list(tensors)
        passed = _GradientsThatCame.apply(came, [needs[p] for p in positions], *(given[p] for p in positions))
        for position, tensor in zip(positions, passed, strict=True):
            given[position] = tensor
        outputs = run(*given, **kwargs)
        for index, leaf in enumerate(pytree.tree_leaves(outputs)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(_noting(came, numbers[index]))
        return outputs

    return call


def _numbers_of(reading: Reading) -> list[int]:
    """For each output the number under which its gradient comes: its own, or that of what it is a view of."""
    plain = [f for f in reading.traced.outputs if f.role is OutputRole.PLAIN]
    others = [f for f in reading.traced.outputs if f.role is OutputRole.OTHER]
    differentiable = set(reading.traced.tangents.values())
    owners = {f.node: number for number, f in enumerate((*plain, *others)) if number in differentiable}
    return [
        index
        if index in differentiable
        else reading.views_out[index][0]
        if index in reading.views_out
        else owners.get(f.node, index)
        for index, f in enumerate(plain)
    ]


def _noting(came: set[int], number: int) -> Callable[[torch.Tensor | None], None]:
    def note(gradient: torch.Tensor | None) -> None:
        # Where a gradient came for another output of the same call, the hook is called without one.
        if gradient is not None:
            came.add(number)

    return note


class _GradientsThatCame(torch.autograd.Function):
    """Passes tensors on, and back only the gradients that depend on an output for which one came."""

    @staticmethod
    def forward(
        ctx: Any, came: set[int], needs: Sequence[frozenset[int]], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Views of the tensors."""
        ctx.came, ctx.needs = came, needs
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The gradients, None in place of zeros."""
        kept = (
            gradient if needs & ctx.came else None
            for gradient, needs in zip(gradients, ctx.needs, strict=True)
        )
        return (None, None, *kept)
