"""A step taken apart: each distinct block with the inputs of its call, and the rest with a place for each block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.blockwise.alike import Operations, attributes_of
from planner.errors import CaptureError
from planner.lower.fakes import KnownConstants, fake_mode_of, fake_module, fake_tree
from planner.lower.signature import call_arguments
from planner.lower.trace import pytree, storage_bytes, storage_key
from planner.step import named_inputs


@dataclass(frozen=True)
class Block:
    """Blocks that are alike: one of them stands for all.

    Attributes:
        names: of the alike blocks, in the order in which they run.
        module: the first of them.
        inputs: of its call, by name or by position.
        output_bytes: of what it returns.
    """

    names: tuple[str, ...]
    module: nn.Module
    inputs: Any
    output_bytes: int


@dataclass(frozen=True)
class Pieces:
    """A step taken apart.

    Attributes:
        blocks: distinct ones.
        order: names of all blocks in the order in which they run.
        rest: the module with a `Place` where each block was.
        shared_bytes: of tensors without a gradient that blocks are given (masks, positions).
    """

    blocks: tuple[Block, ...]
    order: tuple[str, ...]
    rest: nn.Module
    shared_bytes: int


class Place(nn.Module):
    """Stands where a block was: one operation that retains its input, as whatever runs there does.

    Args:
        position: of the tensor among the flat arguments that the block maps to its output.
        output: what the block returned.
    """

    def __init__(self, position: int, output: Any) -> None:
        super().__init__()
        self._position = position
        leaves, self._spec = pytree.tree_flatten(output)
        self._leaves = [_MADE if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The square of the input, where the block's output was."""
        made = pytree.tree_leaves((args, kwargs))[self._position].square()
        leaves = [made if leaf is _MADE else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)


_MADE = "<the output>"


@dataclass(frozen=True)
class _Call:
    """What one block was called with and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    kind: str


def pieces_of(step: nn.Module, batch: Any, *, blocks: Sequence[str]) -> Pieces:
    """Run the forward of a step without memory, note what its blocks are called with, and take it apart.

    Args:
        step: returns its loss; real, fake or meta parameters.
        batch: its inputs.
        blocks: names of modules in it.

    Returns:
        The pieces.

    Raises:
        CaptureError: a block is not called exactly once, or does not map one tensor to one of the same shape.
        PlanMismatchError: it takes inputs by position that have no name, and others by name.
    """
    mode = fake_mode_of(step, batch)
    fake = fake_module(step, mode)
    calls: dict[str, _Call] = {}
    kinds: dict[tuple[str, str], str] = {}
    for name in blocks:
        _listen(fake.get_submodule(name), name, calls, kinds)
    args, kwargs = call_arguments(fake_tree(batch, mode))
    with mode, KnownConstants():
        fake(*args, **kwargs)
    missing = [name for name in blocks if name not in calls]
    if missing:
        raise CaptureError(f"the block {missing[0]!r} is never called; plan the whole step in one")
    # A copy that shares every tensor: capture makes fakes of them itself.
    rest = copy.deepcopy(step, {id(tensor): tensor for tensor in (*step.parameters(), *step.buffers())})
    alike: dict[str, list[str]] = {}
    shared: dict[int, int] = {}
    for name, call in calls.items():
        parent, _, last = name.rpartition(".")
        setattr(rest.get_submodule(parent), last, Place(_mapped(name, call), call.output))
        alike.setdefault(call.kind, []).append(name)
        shared |= {
            storage_key(leaf): storage_bytes(leaf)
            for leaf in pytree.tree_leaves((call.args, call.kwargs))
            if isinstance(leaf, torch.Tensor) and not leaf.requires_grad
        }
    found = tuple(
        _block(tuple(names), step.get_submodule(names[0]), calls[names[0]]) for names in alike.values()
    )
    return Pieces(found, tuple(calls), rest, sum(shared.values()))


def _listen(block: nn.Module, name: str, calls: dict[str, _Call], kinds: dict[tuple[str, str], str]) -> None:
    """Note the call of a block; one like a block that has run is not run again, a `Place` answers for it.

    Blocks that differ in a plain attribute alone, such as the number of a layer, are run: they are of one kind if
    they run the same operations.
    """
    forward = block.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        if name in calls:
            raise CaptureError(f"the block {name!r} is called more than once; plan the whole step in one")
        key = _settings(block, args, kwargs), attributes_of(block)
        alike = next(((n, call) for n, call in calls.items() if call.kind == kinds.get(key)), None)
        if alike is None:
            with Operations() as ran:
                output = forward(*args, **kwargs)
            kinds[key] = f"{key[0]} {ran.digest}"
        else:
            output = Place(_mapped(*alike), alike[1].output)(*args, **kwargs)
        calls[name] = _Call(args, kwargs, output, kinds[key])
        return output

    block.forward = noted  # type: ignore[method-assign]


def _mapped(name: str, call: _Call) -> int:
    """Which of the flat arguments becomes the output."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    outputs = [leaf for leaf in pytree.tree_leaves(call.output) if isinstance(leaf, torch.Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor | str | int | float | None)]
    if others:
        raise CaptureError(
            f"the block {name!r} is given a {type(others[0]).__name__}, and only tensors and plain values can be "
            "planned; plan the whole step in one"
        )
    tensors = {at: leaf for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    mapped = [
        at
        for at, leaf in tensors.items()
        if leaf.is_floating_point()
        and outputs
        and (leaf.shape, leaf.dtype) == (outputs[0].shape, outputs[0].dtype)
    ]
    if len(outputs) != 1 or not mapped:
        raise CaptureError(
            f"the block {name!r} does not map one tensor to one of the same shape; plan the whole step in one"
        )
    return mapped[0]


def _settings(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What alike blocks share: class, settings, parameters, and what they are called with."""
    parameters = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters()]
    settings = [(n, type(m).__name__, m.extra_repr(), m.training) for n, m in block.named_modules()]
    return repr((parameters, settings, pytree.tree_map(_word, (args, kwargs))))


def _word(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype}{tuple(leaf.shape)}{leaf.stride()}{leaf.requires_grad}"
    return repr(leaf)


def _block(names: tuple[str, ...], module: nn.Module, call: _Call) -> Block:

    def alone(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach().requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map_only(torch.Tensor, alone, (call.args, call.kwargs))
    outputs = [leaf for leaf in pytree.tree_leaves(call.output) if isinstance(leaf, torch.Tensor)]
    inputs = named_inputs(module, args, kwargs) if kwargs else args
    return Block(names, module, inputs, sum(map(storage_bytes, outputs)))
