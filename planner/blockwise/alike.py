"""Whether two blocks are alike: their plain attributes, and where these differ the operations that they run."""

from __future__ import annotations

import hashlib
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from planner.lower.trace import TorchDispatchMode, pytree

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)


def attributes_of(block: nn.Module) -> str:
    """What a block's modules keep besides parameters, buffers and modules, as text; of objects the class alone."""
    found = [
        (name, key, _text(value))
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in _OF_EVERY_MODULE and key != "forward"
    ]
    return repr(found)


def _text(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(_text, value)))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_text(key)}: {_text(own)}' for key, own in value.items())})"
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__


class Operations(TorchDispatchMode):
    """Follows the operations inside: each with its plain arguments, and of its tensors dtype, shape and origin."""

    def __init__(self) -> None:
        super().__init__()
        self._hash = hashlib.sha256()
        self._number: dict[int, int] = {}
        # Numbers are by identity, so what was seen must stay.
        self._seen: list[torch.Tensor] = []

    @property
    def digest(self) -> str:
        """Equal for those that run the same operations on tensors of the same origin."""
        return self._hash.hexdigest()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs, out))
        self._hash.update(f"{func} {[self._word(leaf) for leaf in leaves]}\n".encode())
        return out

    def _word(self, leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor):
            return _text(leaf)
        if id(leaf) not in self._number:
            self._number[id(leaf)] = len(self._seen)
            self._seen.append(leaf)
        return f"{self._number[id(leaf)]} {leaf.dtype} {tuple(leaf.shape)}"
