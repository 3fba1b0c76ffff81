"""Adam's moments and direction, and RAdam's rectification: what LAMB and the Rangers are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.wide_state import zeros_of


def make_moments(weight: Tensor, state: dict[str, Any]) -> None:
    """Add "step" 0, "exp_avg" and "exp_avg_sq" of zeros to a state without them."""
    if "exp_avg" not in state:
        state["step"] = 0
        state["exp_avg"] = zeros_of(weight)
        state["exp_avg_sq"] = zeros_of(weight)


def update_moments(
    state: dict[str, Any], gradient: Tensor, *, betas: tuple[float, float], maximize: bool
) -> None:
    """Fold `gradient` into the two moments, in place.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2

    Args:
        state: of one tensor, from `make_moments`.
        gradient: g, not written to.
        betas: (b1, b2).
        maximize: take -g for g.

    Reference: Kingma and Ba, 2015, arXiv 1412.6980, algorithm 1.
    """
    beta1, beta2 = betas
    if maximize:
        state["exp_avg"].mul_(beta1).sub_(gradient, alpha=1 - beta1)
    else:
        state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


def adam_direction(state: dict[str, Any], *, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's bias-corrected direction, in one new tensor that the caller may overwrite.

        m^ / (sqrt(v^) + eps),   m^ = m / (1 - b1^t),   v^ = v / (1 - b2^t)

    Reference: Kingma and Ba, 2015, arXiv 1412.6980, algorithm 1.
    """
    correction1 = 1 - betas[0] ** state["step"]
    correction2 = 1 - betas[1] ** state["step"]
    # Both corrections go into the denominator: (1 - b1^t) (sqrt(v^) + eps).
    denominator = state["exp_avg_sq"].sqrt()
    denominator.mul_(correction1 / math.sqrt(correction2)).add_(eps * correction1)
    return torch.div(state["exp_avg"], denominator, out=denominator)


def moment_coefficients(
    step: int, *, betas: tuple[float, float], eps: float, maximize: bool
) -> dict[str, float]:
    """The part of an `AdamRule` that moves the moments and makes Adam's direction of them.

    Both bias corrections go into the denominator, as in `adam_direction`.
    """
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    return {
        "beta1": betas[0],
        "gradient1": (-1 if maximize else 1) * (1 - betas[0]),
        "beta2": betas[1],
        "gradient2": 1 - betas[1],
        "scale": correction1 / math.sqrt(correction2),
        "offset": eps * correction1,
    }


def rectification(step: int, beta2: float, *, rectify_above: float) -> float | None:
    """Factor r_t by which RAdam damps Adam's step, None while the variance of v^ is not tractable.

        rho_inf = 2 / (1 - b2) - 1        rho_t = rho_inf - 2 t b2^t / (1 - b2^t)
        r_t = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
              if rho_t > rectify_above

    Args:
        step: t, from 1.
        beta2: b2.
        rectify_above: 4 in the paper, 5 in the author's code and in torch; not less than 4.

    Returns:
        r_t in (0, 1), or None: step along m^ alone.

    >>> [round(rectification(t, 0.999, rectify_above=5.0) or 0, 6) for t in (5, 6, 7)]
    [0, 0.025821, 0.032739]

    Reference: Liu et al., 2020, arXiv 1908.03265, algorithm 2.
    """
    rho_inf = 2 / (1 - beta2) - 1
    beta2_t = beta2**step
    rho = rho_inf - 2 * step * beta2_t / (1 - beta2_t)
    if rho <= rectify_above:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
