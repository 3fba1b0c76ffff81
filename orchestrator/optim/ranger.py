"""Ranger: RAdam within LookAhead, for small and medium batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.adam_direction import rectification, update_moments
from orchestrator.optim.lookahead import check_lookahead, remember_slow_weight, synchronize
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Params, check_betas, check_number


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
        gradient_centralization: take from each gradient with >= 2 dims its mean over all dims but the first,
            as
            the moments read it; the gradient itself stays as it is.
        rectify_above: least rho_t that is rectified; 5 as in the author's code, 4 as in RAdam's paper.
        maximize: ascend.

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: Wright, 2019, "Ranger"; Liu et al., 2020, arXiv 1908.03265, algorithm 2; Zhang et al., 2019,
    arXiv 1907.08610, algorithm 1; Yong et al., 2020, arXiv 2004.01461, equation 1.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        sync_every: int = 6,
        slow_step_size: float = 0.5,
        gradient_centralization: bool = False,
        rectify_above: float = 5.0,
        maximize: bool = False,
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
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of `group` is out of its range."""
        check_number("lr", group["lr"], low=0.0)
        check_betas(group["betas"])
        check_number("eps", group["eps"], low=0.0)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_number("rectify_above", group["rectify_above"], low=4.0)
        check_lookahead(group)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor, its moments and its slow weights in place."""
        remember_slow_weight(weight, state)
        if group["gradient_centralization"]:
            gradient = centralized(gradient)
        update_moments(state, gradient, betas=group["betas"], maximize=group["maximize"])
        lr, (beta1, beta2), step = group["lr"], group["betas"], state["step"]
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
        rate = lr / (1 - beta1**step)
        factor = rectification(step, beta2, rectify_above=group["rectify_above"])
        if factor is None:
            weight.sub_(state["exp_avg"], alpha=rate)
        else:
            # sqrt(v^) + eps = (sqrt(v) + eps c) / c with c = sqrt(1 - b2^t).
            correction = math.sqrt(1 - beta2**step)
            denominator = state["exp_avg_sq"].sqrt().add_(group["eps"] * correction)
            weight.addcdiv_(state["exp_avg"], denominator, value=-rate * factor * correction)
        synchronize(weight, state["slow"], count=step, group=group)


def centralized(gradient: Tensor) -> Tensor:
    """The gradient without its mean over all dims but the first; vectors and scalars as they are.

    Reference: Yong et al., 2020, arXiv 2004.01461, equation 1.
    """
    if gradient.ndim <= 1:
        return gradient
    return gradient - torch.mean(gradient, dim=tuple(range(1, gradient.ndim)), keepdim=True)
