"""The step that LARS, LAMB and the Rangers share: tensor by tensor, without a device synchronization."""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""Tensors, groups, or named tensors: what a torch optimizer takes."""


class AbstractPerTensorOptimizer(torch.optim.Optimizer, abc.ABC):
    """A torch optimizer whose update of one tensor reads nothing of the others.

    A subclass says which hyper-parameters are valid (`check_group`) and how one tensor moves
    (`update_tensor`). `step` never writes to a gradient. Every decision within an update depends on Python
    numbers only, never on the values of a tensor, so a step runs under fake tensors and never waits for a
    device.

    State of a tensor is made when its first gradient arrives: plain tensors of its shape and dtype, and the
    count of its updates as a Python int under "step".
    """

    @abc.abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError, with value and range, if a hyper-parameter of `group` is out of its range."""

    @abc.abstractmethod
    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move `weight` and `state` in place by one step along `gradient`, which must not be written to."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its hyper-parameters; see `torch.optim.Optimizer.add_param_group`."""
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every tensor that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: a gradient is sparse or complex; nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                self._refuse_unsupported(weight)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update_tensor(weight, weight.grad, self.state[weight], group)
        return loss

    def _refuse_unsupported(self, weight: Tensor) -> None:
        if weight.grad is not None and (weight.grad.layout != torch.strided or weight.grad.is_complex()):
            kind = "complex" if weight.grad.is_complex() else "sparse"
            raise ValueError(
                f"{type(self).__name__} does not support {kind} gradients, got one of shape "
                f"{tuple(weight.shape)}. Make the layer dense and real (for nn.Embedding: "
                "sparse=False), or give this parameter to another optimizer (sparse: SparseAdam)."
            )


def check_number(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high.

    Raises:
        ValueError: `value` is no real number, NaN, or outside [low, high).
    """
    if not isinstance(value, numbers.Real) or not low <= float(value) < high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}), got {value!r}")


def check_betas(betas: Any) -> None:
    """Raise ValueError unless `betas` are two numbers in [0, 1).

    Raises:
        ValueError: another count of values, or one outside [0, 1).
    """
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, low=0.0, high=1.0)
