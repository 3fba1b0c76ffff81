"""A step on the processor by the compiled kernel: two walks over the memory of a tensor, one where it is enough."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from orchestrator.optim.fast.build import Kernel
from orchestrator.optim.fast.items import Item, numbers, reduce_squares
from orchestrator.optim.fast.rules import AdamRule, Rule

# The structure Item of layerwise.cpp.
_ITEM = np.dtype(
    [(name, np.uint64) for name in ("weight", "gradient", "first", "second", "slow")]
    + [(name, np.int64) for name in ("size", "row", "rule")]
    + [("squares", np.float64, (2,))]
)
_FIRST, _SECOND, _BOTH = 1, 2, 3


def takes(item: Item) -> bool:
    """Whether the kernel can make this step."""
    return item.weight.dtype is torch.float32 and (item.weight.is_cpu or item.weight.is_meta)


def step(kernel: Kernel, items: Sequence[Item]) -> None:
    """Make the steps of some tensors, with as many threads as torch's own operations take.

    No tensor is allocated. The result does not depend on the number of threads.
    """
    for kind in (True, False):
        chosen = [item for item in items if isinstance(item.rule, AdamRule) is kind]
        # Sharded tensors wait for the other ranks between their two walks, all of them together.
        waiting = [item for item in chosen if item.groups and item.reads_norms]
        alone = [item for item in chosen if not (item.groups and item.reads_norms)]
        if alone:
            _run(kernel, alone, _table(alone), passes=_BOTH)
        if waiting:
            table = _table(waiting)
            _run(kernel, waiting, table, passes=_FIRST)
            squares = torch.from_numpy(table["squares"].copy())
            reduce_squares(squares, waiting)
            table["squares"] = squares.numpy()
            _run(kernel, waiting, table, passes=_SECOND)


def _table(items: Sequence[Item]) -> np.ndarray:
    table = np.zeros(len(items), _ITEM)
    table["weight"] = [item.weight.data_ptr() for item in items]
    table["gradient"] = [item.gradient.data_ptr() for item in items]
    table["first"] = [0 if item.first is None else item.first.data_ptr() for item in items]
    table["second"] = [0 if item.second is None else item.second.data_ptr() for item in items]
    table["slow"] = [0 if item.slow is None else item.slow.data_ptr() for item in items]
    table["size"] = [item.weight.numel() for item in items]
    table["row"] = [item.row for item in items]
    return table


def _run(kernel: Kernel, items: Sequence[Item], table: np.ndarray, *, passes: int) -> None:
    assert kernel.functions is not None
    rules: dict[int, tuple[int, Rule]] = {}
    for item in items:
        rules.setdefault(id(item.rule), (len(rules), item.rule))
    table["rule"] = [rules[id(item.rule)][0] for item in items]
    coefficients = np.array([numbers(rule) for _, rule in rules.values()], np.float64)
    is_adam = isinstance(items[0].rule, AdamRule)
    function = kernel.functions.lowtide_adam if is_adam else kernel.functions.lowtide_lars
    function(
        ctypes.c_void_p(table.ctypes.data),
        len(items),
        ctypes.c_void_p(coefficients.ctypes.data),
        passes,
        torch.get_num_threads(),
    )
