"""LARS: momentum SGD whose rate of each layer is set by the ratio of its weight norm to its gradient norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.checks import check_flags, check_number
from orchestrator.optim.fast.rules import LarsRule
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Implementation, NonFinite, Params, move
from orchestrator.optim.trust_ratio import layer_norm
from orchestrator.optim.wide_state import zeros_of


class LARS(AbstractPerTensorOptimizer):
    """Layer-wise adaptive rate scaling.

        l = eta ||w|| / (||g|| + lambda ||w||)      1 where ||w|| or ||g|| is 0, or layer_adaptation is off
        v <- mu v + lr l (g + lambda w)                 w <- w - v

    With lr_in_momentum=False the rate multiplies the velocity when it is applied, as in torch's SGD; the two
    differ only when lr changes between steps:

        v <- mu v + l (g + lambda w)                    w <- w - lr v

    With nesterov the weights move by mu v + (the velocity's new term) instead of v. State: one tensor, none
    with momentum 0. A step makes no temporary tensor of the size of a weight.

    Args:
        params: tensors or groups; each group may set its own hyper-parameters.
        lr: global rate.
        momentum: mu.
        weight_decay: lambda.
        trust_coefficient: eta.
        nesterov: look ahead along the velocity; needs a momentum.
        lr_in_momentum: True as in the paper, False as in torch's SGD.
        layer_adaptation: False for biases and normalization gains (see `param_groups`): l = 1.
        maximize: ascend.
        implementation: "auto", "reference", "foreach" or "fused"; see `AbstractPerTensorOptimizer`.
        nonfinite: "propagate", "skip" or "raise"; see there.

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: You, Gitman and Ginsburg, 2017, arXiv 1708.03888, algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        layer_adaptation: bool = True,
        maximize: bool = False,
        implementation: Implementation = "auto",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
            "lr_in_momentum": lr_in_momentum,
            "layer_adaptation": layer_adaptation,
            "maximize": maximize,
            "implementation": implementation,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of `group` is out of its range."""
        check_number("momentum", group["momentum"], low=0.0, high=1.0)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_number("trust_coefficient", group["trust_coefficient"], low=0.0)
        check_flags(group, "nesterov", "lr_in_momentum", "layer_adaptation", "maximize")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum in (0, 1), got 0")

    def make_state(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The velocity, unless there is no momentum."""
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_of(weight)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor and its velocity in place."""
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        sign = -1.0 if group["maximize"] else 1.0
        ratio = self._ratio(weight, gradient, group)
        if momentum:
            term = ratio * lr if group["lr_in_momentum"] else ratio
            velocity = state["momentum_buffer"].mul_(momentum)
            move(velocity, gradient, -sign * term)
            if weight_decay:
                move(velocity, weight, -weight_decay * term)
        if group["nesterov"] or not momentum:
            # The weight comes first on both sides: its decay reads it before the gradient moves it.
            if weight_decay:
                move(weight, weight, weight_decay * lr * ratio)
            move(weight, gradient, sign * lr * ratio)
        if momentum:
            rate = 1.0 if group["lr_in_momentum"] else lr
            move(weight, state["momentum_buffer"], rate * (momentum if group["nesterov"] else 1.0))

    def rule(self, step: int, group: dict[str, Any]) -> LarsRule:
        """The same update as coefficients."""
        lr, momentum, nesterov = group["lr"], group["momentum"], group["nesterov"]
        rate = 1.0 if group["lr_in_momentum"] else lr
        return LarsRule(
            momentum=momentum,
            term=lr if group["lr_in_momentum"] else 1.0,
            sign=-1.0 if group["maximize"] else 1.0,
            decay=group["weight_decay"],
            along_buffer=rate * (momentum if nesterov else 1.0) if momentum else 0.0,
            along_term=lr if nesterov or not momentum else 0.0,
            trust=group["trust_coefficient"],
            is_adapted=group["layer_adaptation"],
        )

    @staticmethod
    def _ratio(weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor | float:
        if not group["layer_adaptation"]:
            return 1.0
        weight_norm, gradient_norm = layer_norm(weight), layer_norm(gradient)
        denominator = gradient_norm + group["weight_decay"] * weight_norm
        ratio = group["trust_coefficient"] * weight_norm / denominator
        is_adapted = (weight_norm > 0) & (gradient_norm > 0)
        return torch.where(is_adapted, ratio, torch.ones_like(ratio))
