"""Gradients of a module's outputs in the layout that the loss gives them, where torch would guess another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch._aot_autograd import collect_metadata_analysis, input_output_analysis
from torch._functorch._aot_autograd.schemas import MemoryFormatMeta

_COERCE = "coerce_tangent_and_suggest_memory_format"
# (dtype, layout of an output) -> layout of its gradient; layouts as `layout_of` gives them.
Layouts = Mapping[str, str]


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


def gradient_layouts(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, str]:
    """What to tell `laid_out` for these (output, gradient): only gradients of another layout than the output's.

    Outputs of one dtype and layout whose gradients differ in layout cannot be told apart; they are left to torch.
    """
    found: dict[str, set[str]] = {}
    for output, gradient in pairs:
        found.setdefault(_key(output), set()).add(layout_of(gradient))
    return {
        key: next(iter(layouts))
        for key, layouts in found.items()
        if len(layouts) == 1 and "" not in layouts and not key.endswith(f": {next(iter(layouts))}")
    }


@contextmanager
def laid_out(layouts: Layouts) -> Iterator[None]:
    """A trace inside takes the gradients of its outputs in these layouts; without one, in that of the output.

    torch copies a gradient that comes in another layout than it was traced with: memory that eager does not take,
    and sums that round differently.
    """
    original = getattr(collect_metadata_analysis, _COERCE)

    def coerce(x: Any) -> Any:
        out, meta, updated = original(x)
        layout = layouts.get(_key(x)) if isinstance(x, torch.Tensor) else None
        if layout is None or not isinstance(meta, MemoryFormatMeta):
            return out, meta, updated
        strides = strides_of(layout, x.shape)
        made = x.new_empty_strided(tuple(x.shape), strides)
        return made, MemoryFormatMeta(size=x.size(), stride=strides), True

    if not layouts:
        yield
        return
    modules = (collect_metadata_analysis, input_output_analysis)
    for module in modules:
        setattr(module, _COERCE, coerce)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, _COERCE, original)


def _key(output: torch.Tensor) -> str:
    return f"{str(output.dtype).removeprefix('torch.')}: {layout_of(output)}"
