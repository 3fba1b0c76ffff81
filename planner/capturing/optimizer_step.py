"""The optimizer of a rank, tried without memory: bytes of its state and of its step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import CaptureError
from planner.lower.fakes import fake_mode_of, fake_module
from planner.lower.trace import TorchDispatchMode, pytree, storage_bytes, storage_key

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Optimizers = BuildOptimizer | Sequence[BuildOptimizer]
"""Builds the optimizer of a module; several build those of a run that come one after the other."""

Shape = Callable[[torch.Tensor], tuple[int, ...]]


def optimizer_bytes(model: nn.Module, optimizers: Optimizers, *, shape: Shape) -> tuple[int, int]:
    """State bytes of an optimizer, and the most bytes that one of its steps allocates besides.

    The optimizer steps twice without memory: the first step makes its state, the second shows what it allocates on
    the way. Of several, each is freed before the next one makes its state, so with states s_i and temporaries t_i

        state = max s_i         temporaries = max (s_i + t_i) - state

    Args:
        model: real, fake or meta parameters.
        optimizers: of the run.
        shape: of the part of a parameter that an optimizer works on.

    Returns:
        (state, temporaries), each in bytes.

    Raises:
        CaptureError: a step cannot be tried without memory.
    """
    builds = optimizers if isinstance(optimizers, Sequence) else (optimizers,)
    each = [_bytes_of(model, build, shape=shape) for build in builds]
    state_bytes = max(state for state, _ in each)
    return state_bytes, max(state + temporaries for state, temporaries in each) - state_bytes


def _bytes_of(model: nn.Module, optimizer: BuildOptimizer, *, shape: Shape) -> tuple[int, int]:
    mode = fake_mode_of(model, ())
    fake = fake_module(model, mode)
    live = _LiveBytes()
    with mode:
        _cut(fake, shape)
        built = optimizer(fake)
        for parameter in fake.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        try:
            built.step()
            with live:
                built.step()
        except (RuntimeError, TypeError) as error:
            raise CaptureError(
                f"a step of {type(built).__name__} cannot be tried without memory ({type(error).__name__}: "
                f"{str(error).splitlines()[0][:200]}). Choose one whose step needs no closure and no values."
            ) from error
    state = pytree.tree_leaves([*built.state.values()])
    return unique_bytes(t for t in state if isinstance(t, torch.Tensor)), live.peak_bytes


def _cut(fake: nn.Module, shape: Shape) -> None:
    """Replace the parameters of a fake module by parts of them; tied ones stay tied."""
    parts: dict[nn.Parameter, nn.Parameter] = {}
    for module in fake.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in parts:
                    part = parameter.new_empty(shape(parameter))
                    whole = part.shape == parameter.shape
                    parts[parameter] = (
                        parameter if whole else nn.Parameter(part, requires_grad=parameter.requires_grad)
                    )
                module._parameters[name] = parts[parameter]


def unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of some tensors."""
    storages = {storage_key(t): storage_bytes(t) for t in tensors}
    return sum(storages.values())


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make inside: how many bytes of them live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage_key(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            key = storage_key(tensor)
            if key in self._owners:
                self._hold(tensor, key, 0)
            elif key not in known:
                self._hold(tensor, key, storage_bytes(tensor))
        return out

    def _hold(self, tensor: torch.Tensor, key: int, new_bytes: int) -> None:
        size = storage_bytes(tensor)
        self._owners[key] = self._owners.get(key, 0) + 1
        self.live_bytes += new_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self.live_bytes -= size
