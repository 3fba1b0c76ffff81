"""RangerLARS: RAdam's direction, scaled layer by layer as in LARS, within LookAhead; for large batches."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator.optim.adam_direction import (
    adam_direction,
    make_moments,
    moment_coefficients,
    rectification,
    update_moments,
)
from orchestrator.optim.checks import check_betas, check_choice, check_flags, check_number
from orchestrator.optim.fast.rules import AdamRule
from orchestrator.optim.lookahead import check_lookahead, remember_slow_weight, slow_step, synchronize
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Implementation, NonFinite, Params, move
from orchestrator.optim.trust_ratio import trust_ratio

Trust = Literal["direction", "before_rectify"]
TRUST_RULES: tuple[Trust, ...] = ("direction", "before_rectify")
Compat = Literal["over9000"]
LARGEST_NORM = 10.0


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

    "direction" is the default because it was measured to need fewer steps (tests/bench/large_batch.py, one
    rate without warm-up, the best of a common grid for each). Median steps to the training loss at batch 32,
    256, 1024 and 4096 on MNIST's digits: 388, 66, 33, 27 against 474, 102, 50, 35 with "before_rectify"; at
    the same batches on a byte-level GPT: 163, 66, 56, 56 against 201, 92, 66, 78. What the damping protects from
    costs more steps than it saves once the rate is tuned.

    compat="over9000" is the rule of the code that first had the name, to compare with it. Its ratio divides by
    the norm of the weights after a plain step, so it stays near 1 until ||w|| is past 10, and eps is added to
    the uncorrected sqrt(v):

        w' = (1 - lr lambda) w,   s = m^ sqrt(1 - b2^t) r_t / (sqrt(v) + eps), or m^
        w <- w' - lr eta min(||w'||, 10) / ||w' - lr s|| s

    State: three tensors (two moments, the slow weights).

    Args:
        params: tensors or groups; each group may set its own hyper-parameters.
        lr: global rate: the fraction of its norm by which an adapted layer moves in a step, over eta.
        betas: decay of the two moments.
        eps: added to sqrt(v^).
        weight_decay: lambda.
        trust_coefficient: eta.
        trust: which direction the ratio is taken from.
        compat: "over9000" for the rule of the first author's code, above; None for ours.
        sync_every: steps between two synchronizations of the slow weights.
        slow_step_size: alpha, in (0, 1].
        layer_adaptation: False for biases and normalization gains (see `param_groups`): ratio 1.
        rectify_above: least rho_t that is rectified; 5 as in the author's code, 4 as in RAdam's paper.
        maximize: ascend.
        implementation: "auto", "reference", "foreach" or "fused"; see `AbstractPerTensorOptimizer`.
        nonfinite: "propagate", "skip" or "raise"; see there.

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: defined by this project from Liu et al., 2020, arXiv 1908.03265 (RAdam); You et al., 2017,
    arXiv 1708.03888 (LARS); Zhang et al., 2019, arXiv 1907.08610 (LookAhead).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1.0,
        trust: Trust = "direction",
        compat: Compat | None = None,
        sync_every: int = 6,
        slow_step_size: float = 0.5,
        layer_adaptation: bool = True,
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
            "trust_coefficient": trust_coefficient,
            "trust": trust,
            "compat": compat,
            "sync_every": sync_every,
            "slow_step_size": slow_step_size,
            "layer_adaptation": layer_adaptation,
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
        check_number("trust_coefficient", group["trust_coefficient"], low=0.0)
        check_number("rectify_above", group["rectify_above"], low=4.0)
        check_flags(group, "layer_adaptation", "maximize")
        check_choice("trust", group["trust"], TRUST_RULES)
        if group["compat"] not in (None, "over9000"):
            raise ValueError(f"compat must be None or 'over9000', got {group['compat']!r}")
        if group["compat"] is not None and group["trust"] != "direction":
            raise ValueError(f"compat={group['compat']!r} has a ratio of its own: leave trust out")
        check_lookahead(group)

    def make_state(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Two moments and the slow weights."""
        remember_slow_weight(weight, state)
        make_moments(weight, state)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor, its moments and its slow weights in place; one temporary of its size, or two."""
        betas, eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
        update_moments(state, gradient, betas=betas, maximize=group["maximize"])
        factor = rectification(state["step"], betas[1], rectify_above=group["rectify_above"])
        rate = group["lr"] * group["trust_coefficient"]
        if group["compat"] == "over9000":
            self._update_as_over9000(weight, state, group, factor)
        else:
            if factor is None:
                update = state["exp_avg"] / (1 - betas[0] ** state["step"])
            else:
                update = adam_direction(state, betas=betas, eps=eps).mul_(factor)
            _add_decay(update, weight, weight_decay)
            normed = update
            if group["layer_adaptation"] and group["trust"] == "before_rectify":
                normed = _add_decay(adam_direction(state, betas=betas, eps=eps), weight, weight_decay)
            ratio = trust_ratio(weight, normed) if group["layer_adaptation"] else 1.0
            move(weight, update, ratio * rate)
        synchronize(weight, state["slow"], count=state["step"], group=group)

    def _update_as_over9000(
        self, weight: Tensor, state: dict[str, Any], group: dict[str, Any], factor: float | None
    ) -> None:
        if factor is None:
            update = state["exp_avg"].clone()
        else:
            update = torch.div(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]))
        update.mul_(_over9000_step(state["step"], group, factor))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        ratio = 1.0
        if group["layer_adaptation"]:
            candidate = weight.clone()
            move(candidate, update, group["lr"])
            ratio = trust_ratio(weight, candidate, largest=LARGEST_NORM)
        move(weight, update, ratio * group["lr"] * group["trust_coefficient"])

    def rule(self, step: int, group: dict[str, Any]) -> AdamRule:
        """The same update as coefficients."""
        betas, decay, lr = group["betas"], group["weight_decay"], group["lr"]
        factor = rectification(step, betas[1], rectify_above=group["rectify_above"])
        moments = moment_coefficients(step, betas=betas, eps=group["eps"], maximize=group["maximize"])
        rate = lr * group["trust_coefficient"]
        common = {"slow_step": slow_step(step, group), "is_adapted": group["layer_adaptation"]}
        if group["compat"] == "over9000":
            length, keep = _over9000_step(step, group, factor), 1 - lr * decay
            return AdamRule(
                **{**moments, "scale": 1.0, "offset": group["eps"]},
                normed_direction=0.0 if factor is None else -lr * length,
                normed_moment=-lr * length if factor is None else 0.0,
                normed_weight=keep,
                keep=keep,
                rate=rate,
                direction=0.0 if factor is None else length,
                moment=length if factor is None else 0.0,
                weight=0.0,
                largest_norm=LARGEST_NORM,
                norm_scale=keep,
                **common,
            )
        moment = 1 / (1 - betas[0] ** step) if factor is None else 0.0
        is_before = group["trust"] == "before_rectify"
        return AdamRule(
            **moments,
            normed_direction=1.0 if is_before else factor or 0.0,
            normed_moment=0.0 if is_before else moment,
            normed_weight=decay,
            keep=1.0,
            rate=rate,
            direction=factor or 0.0,
            moment=moment,
            weight=decay,
            **common,
        )


def _add_decay(direction: Tensor, weight: Tensor, weight_decay: float) -> Tensor:
    """Add lambda w to `direction` in place; no pass over memory without a decay."""
    return direction.add_(weight, alpha=weight_decay) if weight_decay else direction


def _over9000_step(step: int, group: dict[str, Any], factor: float | None) -> float:
    """What multiplies m / (sqrt(v) + eps), or m: both bias corrections, and r_t once it is defined."""
    beta1, beta2 = group["betas"]
    return (1.0 if factor is None else factor * math.sqrt(1 - beta2**step)) / (1 - beta1**step)
