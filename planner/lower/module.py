"""PlannedModule: used like the model that it was made from, executing a plan in training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from planner.errors import PlanMismatchError
from planner.lower.compile import Compiled, check_inputs, compile_step
from planner.lower.executor import Executor, aten
from planner.plan_file import Plan

_log = logging.getLogger(__name__)


class PlannedModule(nn.Module):
    """The same parameters, buffers, submodules and state dict as a model; its training step runs a plan.

    In training mode with gradients enabled the plan runs; otherwise (``eval()``, ``no_grad()``) the model itself
    is called. The step is captured and checked at the first call.

    Args:
        model: the module; it shares all its tensors with this one.
        plan: made for it.
        executor: runs the halves of the step.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, executor: Executor = aten) -> None:
        super().__init__()
        # The registries themselves are shared, so that what changes in one module changes in the other.
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self.training = model.training
        self.__dict__["_original"] = model
        self.__dict__["plan"] = plan
        self.__dict__["_executor"] = executor
        self.__dict__["_compiled"] = None
        self.__dict__["_compiled_state"] = None
        self.__dict__["_replaced"] = frozenset[str]()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled step, which the copy makes again."""
        return {**self.__dict__, "_compiled": None}

    def train(self, mode: bool = True) -> PlannedModule:
        """Set the mode here and in the model."""
        super().train(mode)
        self._original.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs."""
        if not (self.training and torch.is_grad_enabled()):
            return self._original(*args, **kwargs)
        check_inputs(self.plan, _inputs(args, kwargs))
        state = _state(self._original)
        compiled: tuple[list[str], Compiled] | None = self._compiled
        if compiled is None or self._compiled_state != state:
            replaced: set[str] = set()
            compiled = compile_step(
                self._original,
                _inputs(args, kwargs),
                self.plan,
                executor=self._executor,
                replaced=replaced,
            )
            # Once, however often the step is compiled again.
            for name in sorted(replaced - self._replaced):
                _log.warning("the planned module returns None in place of a %s", name)
            self.__dict__["_replaced"] = self._replaced | replaced
            self.__dict__.update(_compiled=compiled, _compiled_state=state)
        names, call = compiled
        tensors = [_tensor(self._original, name) for name in names]
        return call(tensors, args, kwargs)


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What may change between calls and with it the graph: modes, hooks, frozen parameters, autocast."""
    modules = tuple(
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    )
    frozen = tuple(p.requires_grad for p in model.parameters())
    autocast = tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )
    return modules, frozen, autocast


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args and kwargs:
        raise PlanMismatchError(
            "a planned module takes its inputs all by position or all by name, as in the batch of the plan; "
            f"got {len(args)} by position and {sorted(kwargs)} by name."
        )
    return kwargs or args


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = owner._parameters.get(leaf)
    return tensor if tensor is not None else owner._buffers[leaf]  # type: ignore[return-value]
