"""PlannedModule: used like the model that it was made from, executing a plan in training."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cost_models.units import format_bytes
from planner.errors import PlanMismatchError
from planner.lower.compile import Compiled, compile_step
from planner.lower.executor import Executor
from planner.lower.other_batch import only_sizes_differ
from planner.lower.signature import input_words
from planner.plan_file import Plan
from planner.step import named_inputs

Replan = Callable[[nn.Module, Any, Plan], Plan]
# (index among the modules, "_parameters" or "_buffers", name there) of each tensor; and what runs the step.
_Place = tuple[int, str, str]
_Step = tuple[list[_Place], Compiled]
_SETTINGS = (bool, int, float, str)
# Batches of different sizes whose compiled steps are kept.
_MOST_COMPILED = 8
_log = logging.getLogger(__name__)


class PlannedModule(nn.Module):
    """The same parameters, buffers, submodules and state dict as a model; its training step runs a plan.

    In training mode with gradients enabled the plan runs; otherwise (``eval()``, ``no_grad()``) the model itself
    is called. The step is captured and checked at the first call.

    Args:
        model: the module; it shares all its tensors with this one.
        plan: made for it.
        executor: runs the halves of the step; None for the one that the plan was made for.
        replan: ``replan(model, inputs, plan)`` makes a plan for inputs of other sizes within the same budget.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, *, executor: Executor | None = None, replan: Replan | None = None
    ) -> None:
        super().__init__()
        # The registries themselves are shared, so that what changes in one module changes in the other.
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self.training = model.training
        self.__dict__["_original"] = model
        self.__dict__["plan"] = plan
        self.__dict__["_executor"] = executor
        self.__dict__["_replan"] = replan
        self.__dict__["_compiled"] = OrderedDict()
        self.__dict__["_replaced"] = frozenset[str]()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled step, which the copy makes again."""
        return {**self.__dict__, "_compiled": OrderedDict()}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the mode is the model's too, whether ``train()`` sets it or an assignment."""
        super().__setattr__(name, value)
        if name == "training" and "_original" in self.__dict__:
            self._original.training = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs."""
        if not (self.training and torch.is_grad_enabled()):
            return self._original(*args, **kwargs)
        if args and kwargs:
            args, kwargs = (), named_inputs(self._original, args, kwargs)
        inputs = kwargs or args
        modules = _modules_of(self._original, [])
        key = (_state(modules), input_words(inputs))
        compiled: OrderedDict[Any, _Step] = self._compiled
        if key not in compiled:
            names, call = self._compile(inputs)
            compiled[key] = _places(self._original, modules, names), call
            if len(compiled) > _MOST_COMPILED:
                compiled.popitem(last=False)
        compiled.move_to_end(key)
        places, call = compiled[key]
        tensors = [getattr(modules[index], registry)[leaf] for index, registry, leaf in places]
        return call(tensors, args, kwargs)

    def _compile(self, inputs: Any) -> tuple[list[str], Compiled]:
        """Compile the step for these inputs; the first call must be the plan's, later ones may have other sizes."""
        planned, found = self.plan.signature.inputs, input_words(inputs)
        if planned == found or not self._compiled or not only_sizes_differ(planned, found):
            return self._compiled_with(inputs, self.plan, other_batch=False)
        try:
            compiled = self._compiled_with(inputs, self.plan, other_batch=True)
            how = "it runs the same schedule, within the same peak"
        except PlanMismatchError as error:
            if self._replan is None or self.plan.num_loss:
                raise
            _log.info("a batch of other sizes is planned anew: %s", error)
            plan = self._replan(self._original, inputs, self.plan)
            compiled = self._compiled_with(inputs, plan, other_batch=False)
            how = f"it is planned anew within the budget, peak {format_bytes(plan.predicted_peak_bytes)}"
        _log.warning("a batch of other sizes than the plan's (%s): %s", _first_other(planned, found), how)
        return compiled

    def _compiled_with(self, inputs: Any, plan: Plan, *, other_batch: bool) -> tuple[list[str], Compiled]:
        replaced: set[str] = set()
        compiled = compile_step(
            self._original,
            inputs,
            plan,
            executor=self._executor,
            replaced=replaced,
            other_batch=other_batch,
        )
        # Once, however often the step is compiled again.
        for name in sorted(replaced - self._replaced):
            _log.warning("the planned module returns None in place of a %s", name)
        self.__dict__["_replaced"] = self._replaced | replaced
        return compiled


def _first_other(planned: Sequence[str], found: Sequence[str]) -> str:
    old, new = next((a, b) for a, b in zip(planned, found, strict=True) if a != b)
    return f"{new} in place of {old}"


def _modules_of(module: nn.Module, found: list[nn.Module]) -> list[nn.Module]:
    """The module and all below it, each as often as it is reached; quicker than ``modules()``, for every step."""
    found.append(module)
    for part in module._modules.values():
        if part is not None:
            _modules_of(part, found)
    return found


def _state(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """What may change between calls and with it the graph.

    Modules, modes, hooks, frozen parameters, autocast, and the settings of torch's own modules (``dropout.p``).
    """
    of_modules = tuple(
        (module, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in modules
    )
    frozen = tuple(p is None or p.requires_grad for module in modules for p in module._parameters.values())
    autocast = tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )
    settings = tuple(
        value
        for module in modules
        if type(module).__module__.startswith("torch.nn.modules.")
        for value in module.__dict__.values()
        if type(value) in _SETTINGS
    )
    return of_modules, frozen, autocast, settings


def _places(model: nn.Module, modules: Sequence[nn.Module], names: Sequence[str]) -> list[_Place]:
    """Where the tensors of these names lie: index among the modules, registry, name there."""
    index_of = {module: index for index, module in enumerate(modules)}
    places = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        is_parameter = owner._parameters.get(leaf) is not None
        places.append((index_of[owner], "_parameters" if is_parameter else "_buffers", leaf))
    return places
