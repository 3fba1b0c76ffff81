"""Ranger: RAdam within LookAhead, for small and medium batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orchestrator.optim.adam_direction import (
    adam_direction,
    make_moments,
    moment_coefficients,
    rectification,
    update_moments,
)
from orchestrator.optim.checks import check_betas, check_flags, check_number
from orchestrator.optim.fast.rules import AdamRule
from orchestrator.optim.lookahead import check_lookahead, remember_slow_weight, slow_step, synchronize
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Implementation, NonFinite, Params, move


class Ranger(AbstractPerTensorOptimizer):
    """Rectified Adam whose weights are pulled towards slow ones every few steps.

        w <- (1 - lr lambda) w - lr r_t m^ / (sqrt(v^) + eps)      once r_t is defined (see `rectification`)
        w <- (1 - lr lambda) w - lr m^                             before: momentum, still a descent
        every `sync_every` steps: slow <- slow + a (w - slow),  w <- slow,   slow starts at w0

    State: three tensors (two moments, the slow weights).

    Args:
        params: tensors or groups; each group may set its own hyper-parameters.
        lr: rate.
        betas: decay of the two moments.
        eps: added to sqrt(v^).
        weight_decay: lambda, decoupled from the moments.
        sync_every: steps between two synchronizations of the slow weights.
        slow_step_size: a, in (0, 1].
        gradient_centralization: take from each gradient with >= 2 dims its mean over all dims but the first, as
            the moments read it; the gradient itself stays as it is.
        rectify_above: least rho_t that is rectified; 5 as in the author's code, 4 as in RAdam's paper.
        maximize: ascend.
        implementation: "auto", "reference", "foreach" or "fused"; see `AbstractPerTensorOptimizer`.
        nonfinite: "propagate", "skip" or "raise"; see there.

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: Wright, 2019, "Ranger"; Liu et al., 2020, arXiv 1908.03265, algorithm 2; Zhang et al., 2019,
    arXiv 1907.08610, algorithm 1; Yong et al., 2020, arXiv 2004.01461, equation 1.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        sync_every: int = 6,
        slow_step_size: float = 0.5,
        gradient_centralization: bool = False,
        rectify_above: float = 5.0,
        maximize: bool = False,
        implementation: Implementation = "auto",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "sync_every": sync_every,
            "slow_step_size": slow_step_size,
            "gradient_centralization": gradient_centralization,
            "rectify_above": rectify_above,
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
        check_number("rectify_above", group["rectify_above"], low=4.0)
        check_flags(group, "gradient_centralization", "maximize")
        check_lookahead(group)

    def make_state(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Two moments and the slow weights."""
        remember_slow_weight(weight, state)
        make_moments(weight, state)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor, its moments and its slow weights in place; one temporary of its size."""
        update_moments(state, gradient, betas=group["betas"], maximize=group["maximize"])
        lr, (beta1, beta2), step = group["lr"], group["betas"], state["step"]
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
        factor = rectification(step, beta2, rectify_above=group["rectify_above"])
        if factor is None:
            move(weight, state["exp_avg"], lr / (1 - beta1**step))
        else:
            move(weight, adam_direction(state, betas=group["betas"], eps=group["eps"]), lr * factor)
        synchronize(weight, state["slow"], count=step, group=group)

    def rule(self, step: int, group: dict[str, Any]) -> AdamRule:
        """The same update as coefficients."""
        factor = rectification(step, group["betas"][1], rectify_above=group["rectify_above"])
        return AdamRule(
            **moment_coefficients(step, betas=group["betas"], eps=group["eps"], maximize=group["maximize"]),
            normed_direction=0.0,
            normed_moment=0.0,
            normed_weight=0.0,
            keep=1 - group["lr"] * group["weight_decay"],
            rate=group["lr"],
            direction=factor or 0.0,
            moment=1 / (1 - group["betas"][0] ** step) if factor is None else 0.0,
            weight=0.0,
            slow_step=slow_step(step, group),
            is_adapted=False,
        )
