"""Memory of one rank that no plan can change: parameters, gradients, optimizer state, buckets, batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from planner.capture import Captured
from planner.errors import CaptureError
from planner.graph import Graph, Phase, ValueKind
from planner.lower.fakes import fake_mode_of, fake_module
from planner.lower.trace import TANGENTS_STAY, TorchDispatchMode, pytree, storage_bytes, storage_key
from planner.problem import StaticMemory


def static_memory(
    captured: Captured,
    model: nn.Module,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None,
    world_size: int,
    accumulation: int,
) -> StaticMemory:
    """Resident bytes of one rank, and the peak of its optimizer step.

    The optimizer is built on fake parameters and steps twice without memory: the first step makes its state,
    the second shows what it allocates on the way. Data-parallel gradients lie in buckets that stay
    (``gradient_as_bucket_view=True``); with accumulation on one rank they stay between micro-batches; otherwise
    backward makes them, and they are part of the schedule.

    Args:
        captured: the step.
        model: the module that it was captured from.
        optimizer: builds the optimizer of a module; None charges nothing.
        world_size: data-parallel ranks.
        accumulation: micro-batches in one step of the optimizer.

    Returns:
        Bytes by owner.
    """
    state_bytes, temporary_bytes = (0, 0) if optimizer is None else optimizer_bytes(model, optimizer)
    gradient_bytes = captured.trainable_bytes
    buckets = gradient_bytes if world_size > 1 else 0
    resident_gradients = gradient_bytes if world_size == 1 and accumulation > 1 else 0
    resident = captured.parameter_bytes + state_bytes + captured.batch_bytes + gradient_bytes
    resident += outputs_bytes(captured.graph)
    return StaticMemory(
        parameter_bytes=captured.parameter_bytes,
        gradient_bytes=resident_gradients,
        optimizer_bytes=state_bytes,
        bucket_bytes=buckets,
        batch_bytes=captured.batch_bytes,
        optimizer_step_peak_bytes=resident + temporary_bytes if optimizer is not None else 0,
    )


def outputs_bytes(graph: Graph) -> int:
    """Bytes of outputs and loss, which the caller holds to the end of the step."""
    phases = (Phase.FORWARD,) if TANGENTS_STAY else (Phase.FORWARD, Phase.LOSS)
    return sum(
        value.size_bytes
        for value in graph.values
        if value.kind is ValueKind.OUTPUT and graph.nodes[value.node].phase in phases
    )


def optimizer_bytes(
    model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[int, int]:
    """State bytes of an optimizer, and the most bytes that one of its steps allocates besides.

    Args:
        model: real, fake or meta parameters.
        optimizer: builds the optimizer of a module.

    Returns:
        (state, temporaries), each in bytes.
    """
    mode = fake_mode_of(model, ())
    fake = fake_module(model, mode)
    live = _LiveBytes()
    with mode:
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
