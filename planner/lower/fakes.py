"""Models and batches without memory: fake tensors, and the few values that are known all the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from planner.errors import CaptureError

# Elements up to which a constant's values are followed.
_MAX_CONSTANT = 1 << 20
_FACTORIES = frozenset(
    {
        torch.arange,
        torch.linspace,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.tensor,
        torch.eye,
        torch.logspace,
    }
)
_READS = frozenset(
    {
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
        torch.Tensor.item,
        torch.Tensor.tolist,
    }
)


class KnownConstants(TorchFunctionMode):
    """Follows the values of small tensors that depend on no input, so that code may branch on them.

    A traced tensor has no values. Those made by `torch.arange` and the like, and what is computed from them
    alone, are computed a second time with real numbers; reading one (``bool``, ``item``, ``tolist``) gives what
    eager gives. Tensors that depend on inputs or parameters stay unknown, and so does what is written in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: MutableMapping[torch.Tensor, tuple[torch.Tensor, int]] = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call; follow its result if everything that it depends on is known."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        values = {id(tensor): self._value(tensor) for tensor in tensors}
        follow = all(value is not None for value in values.values()) if tensors else func in _FACTORIES
        if func in _READS and tensors and follow:
            with _disable_current_modes():
                return func(values[id(args[0])])
        out = func(*args, **kwargs)
        if follow and _is_small(out):
            real_args, real_kwargs = pytree.tree_map_only(
                torch.Tensor, lambda t: values[id(t)], (args, kwargs)
            )
            self._follow(func, real_args, real_kwargs, out)
        return out

    def _value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The real values of a traced tensor that was not written since they were computed."""
        value, version = self._known.get(tensor, (None, -1))
        return value if version == tensor._version else None

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Compute the call with real numbers and keep what it gives."""
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        try:
            with _disable_current_modes(), torch.device("cpu"):
                real = func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError):
            return
        for traced, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(real), strict=False):
            if isinstance(traced, torch.Tensor) and isinstance(value, torch.Tensor):
                self._known[traced] = (value, traced._version)


def _is_small(out: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(tensor.numel() <= _MAX_CONSTANT for tensor in tensors)


def fake_mode_of(model: nn.Module, batch: Any) -> FakeTensorMode:
    """The fake mode that model or batch were built under, or a new one."""
    leaves = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(batch)]
    for leaf in leaves:
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return _new_mode()


def _new_mode() -> FakeTensorMode:
    """A fake mode that captures the same graph every time.

    Its cache gives a kernel's repeated output as one tensor at the first call and as two at the next.
    """
    mode = FakeTensorMode()
    mode.cache_enabled = False
    return mode


@contextmanager
def building_without_memory() -> Iterator[FakeTensorMode]:
    """Models and tensors made inside have shapes and dtypes but no bytes; small constants keep their values."""
    with _new_mode() as mode, KnownConstants():
        yield mode


def fake_module(model: nn.Module, mode: FakeTensorMode, *, replaced: set[str] | None = None) -> nn.Module:
    """The module with every parameter and buffer replaced by a fake of the same layout.

    A tensor on the meta device becomes a fake one on the CPU: the device that it will be built on.

    Args:
        model: the module.
        mode: of the fakes.
        replaced: gets the type names of the outputs that a call leaves out because a graph cannot return them.
    """
    memo: dict[int, Any] = {}
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise CaptureError("the model has lazy parameters without a shape. Run one batch through it first.")
    for tensor in (*model.parameters(), *model.buffers()):
        fake = _fake_tensor(tensor, mode)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    # Known by name: loading FSDP takes seconds, and not every torch has it.
    if any(kind.__name__ == "FSDPModule" for part in model.modules() for kind in type(part).__mro__):
        raise CaptureError(
            "the model is sharded already. Plan and apply it first, then call fully_shard on the planned module."
        )
    try:
        fake = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied for capture ({type(error).__name__}: {error}). "
            "Remove what cannot be copied (locks, open files, non-leaf tensors) from its attributes."
        ) from error
    forward = fake.forward
    names = set[str]() if replaced is None else replaced
    fake.forward = lambda *args, **kwargs: _plain(forward(*args, **kwargs), names)  # type: ignore[method-assign]
    return fake


def _plain(outputs: Any, replaced: set[str]) -> Any:
    """The outputs without objects that a graph cannot return, such as a cache of keys and values."""

    def plain(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, torch.Tensor | bool | int | float | str):
            return leaf
        replaced.add(type(leaf).__name__)
        return None

    return pytree.tree_map(plain, outputs)


def fake_tree(tree: Any, mode: FakeTensorMode) -> Any:
    """The same tree with fake tensors."""
    return pytree.tree_map(
        lambda leaf: _fake_tensor(leaf, mode) if isinstance(leaf, torch.Tensor) else leaf, tree
    )


def _fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    device = "cpu" if tensor.device.type == "meta" else tensor.device
    with mode:
        return torch.empty_strided(
            tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device
        ).requires_grad_(tensor.requires_grad)
