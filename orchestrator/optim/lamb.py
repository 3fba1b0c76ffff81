"""LAMB: Adam whose step of each layer has the length lr times the norm of the layer's weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orchestrator.optim.adam_direction import adam_direction, update_moments
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer, Params, check_betas, check_number
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

    Raises:
        ValueError: a hyper-parameter out of its range.

    Reference: You et al., 2020, arXiv 1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        layer_adaptation: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "layer_adaptation": layer_adaptation,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of `group` is out of its range."""
        check_number("lr", group["lr"], low=0.0)
        check_betas(group["betas"])
        check_number("eps", group["eps"], low=0.0)
        check_number("weight_decay", group["weight_decay"], low=0.0)

    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move one tensor and its moments in place; one temporary of its size."""
        update_moments(state, gradient, betas=group["betas"], maximize=group["maximize"])
        update = adam_direction(state, betas=group["betas"], eps=group["eps"])
        if group["weight_decay"]:
            update.add_(weight, alpha=group["weight_decay"])
        if group["layer_adaptation"]:
            weight.addcmul_(update, trust_ratio(weight, update), value=-group["lr"])
        else:
            weight.sub_(update, alpha=group["lr"])
