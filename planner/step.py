"""A model and its loss as one module, so that a plan covers both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import PlanMismatchError


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with its inputs: a tensor, a sequence of positional ones, or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


def named_inputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call all by name: those given by position have the names of the forward's parameters.

    Raises:
        PlanMismatchError: the forward takes some by position alone.
    """
    kinds = inspect.Parameter
    by_name = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind is kinds.POSITIONAL_OR_KEYWORD
    ]
    if len(args) > len(by_name):
        raise PlanMismatchError(
            f"{type(module).__name__} is called with {len(args)} inputs by position and {sorted(kwargs)} by name, "
            f"but only {len(by_name)} of its inputs by position have names. Call it all by position or all by name."
        )
    return {**dict(zip(by_name, args, strict=False)), **kwargs}


class StepModule(nn.Module):
    """Forward of the whole step: ``loss(model(inputs), targets)``.

    The loss lies inside, so a plan may rematerialize the logits too, and they die when backward has read them.

    Args:
        model: any module.
        loss: ``loss(outputs, targets)`` -> scalar tensor.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Any, targets: Any) -> torch.Tensor:
        """The scalar loss of one micro-batch."""
        return self.loss(call_model(self.model, inputs), targets)
