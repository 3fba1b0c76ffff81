"""LAMB: Adam whose step of each layer has the length lr times the norm of the layer's weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orchestrator.optim.adam_direction import (
    adam_direction,
    make_moments,
    moment_coefficients,
    update_moments,
)
from orchestrator.optim.checks import check_betas, check_flags, check_number
from orchestrator.optim.fast.rules import AdamRule
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Implementation, NonFinite, Params, move
from orchestrator.optim.trust_ratio import trust_ratio


class LAMB(AbstractPerTensorOptimizer):
    """Layer-wise adaptive moments for batch training, in the final form of the paper (no clamp of ||w||).

        u = m^ / (sqrt(v^) + eps) + lambda w
        w <- w - lr (||w|| / ||u||) u            ratio 1 where a norm is 0, or layer_adaptation is off

    with Adam's bias-corrected moments m^ and v^. State: two tensors. To clip gradients by their global norm,
    call `torch.nn.utils.clip_grad_norm_` before the step.

    Args:
        params: tensors or groups; each group may set its own hyper-parameters.
        lr: global rate.
        betas: decay of the two moments.
        eps: added to sqrt(v^).
        weight_decay: lambda.
        layer_adaptation: False for biases and normalization gains (see `param_groups`): ratio 1.
        maximize: ascend.
        implementation: "auto", "reference", "foreach" or "fused"; see `AbstractPerTensorOptimizer`.
        nonfinite: "propagate", "skip" or "raise"; see there.

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: You et al., 2020, arXiv 1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        layer_adaptation: bool = True,
        maximize: bool = False,
        implementation: Implementation = "auto",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "layer_adaptation": layer_adaptation,
            "maximize": maximize,
            "implementation": implementation,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of `group` is out of its range."""
        check_betas(group["betas"])
        check_number("eps", group["eps"], low=0.0)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_flags(group, "layer_adaptation", "maximize")

    def make_state(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Two moments."""
        make_moments(weight, state)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor and its moments in place; one temporary of its size."""
        update_moments(state, gradient, betas=group["betas"], maximize=group["maximize"])
        update = adam_direction(state, betas=group["betas"], eps=group["eps"])
        if group["weight_decay"]:
            update.add_(weight, alpha=group["weight_decay"])
        ratio = trust_ratio(weight, update) if group["layer_adaptation"] else 1.0
        move(weight, update, ratio * group["lr"])

    def rule(self, step: int, group: dict[str, Any]) -> AdamRule:
        """The same update as coefficients."""
        decay = group["weight_decay"]
        return AdamRule(
            **moment_coefficients(step, betas=group["betas"], eps=group["eps"], maximize=group["maximize"]),
            normed_direction=1.0,
            normed_moment=0.0,
            normed_weight=decay,
            keep=1.0,
            rate=group["lr"],
            direction=1.0,
            moment=0.0,
            weight=decay,
            slow_step=0.0,
            is_adapted=group["layer_adaptation"],
        )
