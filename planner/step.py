"""A model and its loss as one module, so that a plan covers both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with its inputs: a tensor, a sequence of positional ones, or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


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
