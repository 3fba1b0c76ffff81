"""RangerLARS: RAdam's direction, scaled layer by layer as in LARS, within LookAhead; for large batches."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator.optim.adam_direction import adam_direction, rectification, update_moments
from orchestrator.optim.lookahead import check_lookahead, remember_slow_weight, synchronize
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Params, check_betas, check_number
from orchestrator.optim.trust_ratio import trust_ratio

Trust = Literal["direction", "before_rectify"]
TRUST_RULES: tuple[Trust, ...] = ("direction", "before_rectify")


class RangerLARS(AbstractPerTensorOptimizer):
    """Layer-adapted rectified Adam within LookAhead.

    With Adam's direction a = m^ / (sqrt(v^) + eps) and RAdam's direction s = r_t a, or s = m^ while r_t is
    not defined (see `rectification`):

        trust = "direction":         ratio = ||w|| / ||s + lambda w||
        trust = "before_rectify":    ratio = ||w|| / ||a + lambda w||
        w <- w - lr eta ratio (s + lambda w)        ratio 1 where a norm is 0, or layer_adaptation is off
        every `sync_every` steps: slow <- slow + alpha (w - slow),  w <- slow,   slow starts at w0

    With "direction" and lambda = 0 every step of an adapted layer has the length lr eta ||w||: the quotient
    cancels r_t, so RAdam's damping of the first steps is lost there, and a warm-up of lr has to stand in for
    it. With "before_rectify" the length is r_t lr eta ||w||, and the damping survives.

    State: three tensors (two moments, the slow weights).

    Args:
        params: tensors or groups; each group may set its own hyper-parameters.
        lr: global rate: the fraction of its norm by which an adapted layer moves in a step, over eta.
        betas: decay of the two moments.
        eps: added to sqrt(v^).
        weight_decay: lambda.
        trust_coefficient: eta.
        trust: which direction the ratio is taken from.
        sync_every: steps between two synchronizations of the slow weights.
        slow_step_size: alpha, in (0, 1].
        layer_adaptation: False for biases and normalization gains (see `param_groups`): ratio 1.
        rectify_above: least rho_t that is rectified; 5 as in the author's code, 4 as in RAdam's paper.
        maximize: ascend.

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: defined by this project from Liu et al., 2020, arXiv 1908.03265 (RAdam); You et al., 2017,
    arXiv 1708.03888 (LARS); Zhang et al., 2019, arXiv 1907.08610 (LookAhead).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1.0,
        trust: Trust = "direction",
        sync_every: int = 6,
        slow_step_size: float = 0.5,
        layer_adaptation: bool = True,
        rectify_above: float = 5.0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust": trust,
            "sync_every": sync_every,
            "slow_step_size": slow_step_size,
            "layer_adaptation": layer_adaptation,
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
        check_number("trust_coefficient", group["trust_coefficient"], low=0.0)
        check_number("rectify_above", group["rectify_above"], low=4.0)
        if group["trust"] not in TRUST_RULES:
            raise ValueError(f"trust must be one of {', '.join(TRUST_RULES)}, got {group['trust']!r}")
        check_lookahead(group)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor, its moments and its slow weights in place; one temporary of its size."""
        remember_slow_weight(weight, state)
        betas, weight_decay = group["betas"], group["weight_decay"]
        update_moments(state, gradient, betas=betas, maximize=group["maximize"])
        factor = rectification(state["step"], betas[1], rectify_above=group["rectify_above"])
        momentum_scale = 1 / (1 - betas[0] ** state["step"])
        ratio = None
        if group["layer_adaptation"] and group["trust"] == "before_rectify":
            update = _with_decay(adam_direction(state, betas=betas, eps=group["eps"]), weight, weight_decay)
            ratio = trust_ratio(weight, update)
            if factor is None:
                update = torch.mul(state["exp_avg"], momentum_scale, out=update)
                _with_decay(update, weight, weight_decay)
            else:
                # r (a + lambda w) + (1 - r) lambda w = r a + lambda w, without another temporary.
                _with_decay(update.mul_(factor), weight, (1 - factor) * weight_decay)
        else:
            if factor is None:
                update = torch.mul(state["exp_avg"], momentum_scale)
            else:
                update = adam_direction(state, betas=betas, eps=group["eps"]).mul_(factor)
            _with_decay(update, weight, weight_decay)
            if group["layer_adaptation"]:
                ratio = trust_ratio(weight, update)
        rate = group["lr"] * group["trust_coefficient"]
        if ratio is None:
            weight.sub_(update, alpha=rate)
        else:
            weight.addcmul_(update, ratio, value=-rate)
        synchronize(weight, state["slow"], count=state["step"], group=group)


def _with_decay(direction: Tensor, weight: Tensor, weight_decay: float) -> Tensor:
    """Add lambda w to `direction` in place; no pass over memory without a decay."""
    return direction.add_(weight, alpha=weight_decay) if weight_decay else direction
