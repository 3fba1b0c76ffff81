"""Gradients of a module's outputs in the layout that the loss gives them, where torch would guess another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch._aot_autograd import collect_metadata_analysis
from torch._functorch._aot_autograd.schemas import MemoryFormatMeta

_COERCE = "coerce_tangent_and_suggest_memory_format"
# Of the gradient of each output of a traced module, as `layout_of` gives it; "" where the guess of torch stands.
Layouts = tuple[str, ...]


def layout_of(tensor: torch.Tensor) -> str:
    """Dimensions from the slowest to the fastest in memory, expanded ones in brackets; "" with gaps between them.

    >>> layout_of(torch.empty(4, 8, 16).transpose(1, 2))
    '0 2 1'
    >>> layout_of(torch.empty(8, 1).expand(8, 3))
    '0 (1)'
    """
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    words = " ".join(f"({dim})" if strides[dim] == 0 and tensor.shape[dim] > 1 else str(dim) for dim in order)
    sizes = [size if size != 1 else None for size in tensor.shape]
    same = all(
        size is None or a == b
        for size, a, b in zip(sizes, strides_of(words, tensor.shape), strides, strict=True)
    )
    return words if same else ""


def strides_of(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of this shape in a layout.

    >>> strides_of("0 2 1", (4, 8, 16))
    (128, 1, 8)
    >>> strides_of("0 (1)", (8, 3))
    (1, 0)
    """
    strides = [0] * len(shape)
    step = 1
    for word in reversed(layout.split()):
        if word.startswith("("):
            continue
        strides[int(word)] = step
        step *= max(1, shape[int(word)])
    return tuple(strides)


@contextmanager
def laid_out(layouts: Layouts) -> Iterator[None]:
    """A trace inside takes the gradients of its outputs in these layouts; "" leaves one to torch.

    torch guesses that a gradient is laid out like its output, and copies one that comes in another layout: memory
    that eager does not take, and sums that round differently.
    """
    if not layouts:
        yield
        return
    guessed = getattr(collect_metadata_analysis, _COERCE)
    turn = itertools.cycle(layouts)  # the outputs are looked at more than once, always in order

    def known(tensor: torch.Tensor) -> Any:
        layout = next(turn)
        if not layout:
            return guessed(tensor)
        strides = strides_of(layout, tensor.shape)
        made = tensor.new_empty_strided(tuple(tensor.shape), strides)
        return made, MemoryFormatMeta(size=made.size(), stride=strides), True

    setattr(collect_metadata_analysis, _COERCE, known)
    try:
        yield
    finally:
        setattr(collect_metadata_analysis, _COERCE, guessed)
