"""The step of an optimizer as an operation: its demand without memory, and itself to be timed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cost_models.measured import OPTIMIZER
from cost_models.work import Work
from planner.calibrating.timer import Distance
from planner.capturing.optimizer_step import BuildOptimizer
from planner.lower.fakes import fake_mode_of, fake_module
from planner.lower.trace import TorchDispatchMode, pytree, storage_bytes

# Of the real parameters and state that are made to time a step.
_MAX_BYTES = 8 << 30


@dataclass(frozen=True)
class OptimizerStep:
    """One step of an optimizer on all parameters of a rank.

    Attributes:
        line: `Work.operation`, by which its time is found again.
        work: its demand.
        model: on the meta device or with fake parameters.
        build: makes the optimizer of a module.
    """

    line: str
    work: Work
    model: nn.Module
    build: BuildOptimizer

    @property
    def distance(self) -> Distance:
        """Parameters and state are those of the step before."""
        return "cold"

    def ready(self, device: torch.device) -> Callable[[], Any]:
        """The step on real parameters and gradients.

        Raises:
            RuntimeError: they are too large to be made for this.
        """
        parameters = dict(self.model.named_parameters())
        need_bytes = 5 * sum(p.numel() * p.element_size() for p in parameters.values())
        if need_bytes > _MAX_BYTES:
            raise RuntimeError(f"the step needs about {need_bytes} bytes")
        real = _Parameters({name: _real(p, device) for name, p in parameters.items()})
        optimizer = self.build(real)
        for parameter in real.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
        optimizer.step()
        return optimizer.step


def optimizer_step(model: nn.Module, build: BuildOptimizer, *, name: str) -> OptimizerStep:
    """The step of an optimizer as one operation.

    Its bytes are those that its operations read and write, counted in a step without memory.

    Args:
        model: parameters of one rank; fake or on the meta device.
        build: makes the optimizer of a module.
        name: of the optimizer with its settings.
    """
    fake = fake_module(model, fake_mode_of(model, ()))
    counted = _Moved()
    with fake_mode_of(fake, ()):
        optimizer = build(fake)
        for parameter in fake.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        with counted:
            optimizer.step()
    shapes = [(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters() if p.requires_grad]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    work = Work(
        flop=float(counted.flop),
        read_bytes=counted.read_bytes,
        written_bytes=counted.written_bytes,
        dtype="float32",
        kind="elementwise",
        operation=f"{OPTIMIZER}{name} on {len(shapes)} tensors of {numbers} numbers {digest}",
    )
    return OptimizerStep(work.operation, work, model, build)


class _Parameters(nn.Module):
    """Parameters under the names that they have in a model, dots and all."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(last, parameter)


def _real(parameter: torch.Tensor, device: torch.device) -> nn.Parameter:
    data = torch.full(tuple(parameter.shape), 0.01, dtype=parameter.dtype, device=device)
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


class _Moved(TorchDispatchMode):
    """Counts what operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = self.written_bytes = self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not written:  # the multi-tensor operators in place return nothing and write their first list
            written = [t for t in pytree.tree_leaves(args[:1]) if isinstance(t, torch.Tensor)]
        if not func.is_view:
            self.read_bytes += sum(map(storage_bytes, read))
            self.written_bytes += sum(map(storage_bytes, written))
            self.flop += sum(t.numel() for t in written)
        return out
