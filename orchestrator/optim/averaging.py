"""Averages of the weights over the last part of a run: SWA and exponential, kept in the optimizer's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import swa_utils

from orchestrator.optim.checks import check_choice, check_count
from orchestrator.optim.fast.items import local_part
from orchestrator.optim.wide_state import copy_of

AVERAGE = "average"
COUNT = "average_count"
Kind = Literal["swa", "ema"]


def keep_average(
    optimizer: torch.optim.Optimizer, *, kind: Kind, start_step: int, decay: float = 0.999
) -> None:
    """From step `start_step` on, average each weight after each step of `optimizer`.

        swa:  average <- average + (w - average) / (n + 1)       n weights are in it
        ema:  average <- average + (1 - decay) (w - average)     both begin at the first weights averaged

    The average is state of the optimizer, made at a tensor's first step, so that its state_dict resumes it bit
    for bit and a planner that steps the optimizer once charges it: one tensor, in float32 for 16 bits.

    Args:
        optimizer: any; a hook after its steps is registered, which a copy or a new optimizer does not have.
        kind: which average.
        start_step: steps of a tensor that are not averaged.
        decay: of the exponential average, in (0, 1).

    Raises:
        ValueError: a value out of its range.

    Reference: Izmailov et al., 2018, arXiv 1803.05407, algorithm 1 (SWA).
    """
    check_choice("kind", kind, ("swa", "ema"))
    if not isinstance(decay, float) or not 0 < decay < 1:
        raise ValueError(f"decay must be a number in (0, 1), got {decay!r}")
    check_count("start_step", start_step, low=0)
    update: Any = swa_utils.get_swa_multi_avg_fn() if kind == "swa" else swa_utils.get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def average_weights(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        by_count: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for weight in _weights_with_gradient(stepped):
            state = stepped.state[weight]
            if AVERAGE not in state:
                state[AVERAGE], state[COUNT] = copy_of(weight), -start_step
            if state[COUNT] >= 0:
                by_count.setdefault(state[COUNT], []).append((state[AVERAGE], weight))
            state[COUNT] += 1
        for num_averaged, pairs in by_count.items():
            for average, weight in pairs if num_averaged == 0 else []:
                average.copy_(weight)
            if num_averaged:
                averages = [local_part(average) for average, _ in pairs]
                weights = [local_part(weight.detach()).to(average.dtype) for average, weight in pairs]
                update(averages, weights, num_averaged)

    optimizer.register_step_post_hook(average_weights)


def _weights_with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                yield weight


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the model has its averaged weights, afterwards those that it had before.

    A weight whose average has not started stays as it is. Costs a copy of the weights. Batch-norm statistics are
    not those of the averaged weights: make them anew with `torch.optim.swa_utils.update_bn`. Do not step inside.
    """
    before = [(w, w.detach().clone()) for w, state in optimizer.state.items() if state.get(COUNT, 0) > 0]
    with torch.no_grad():
        for weight, _ in before:
            weight.copy_(optimizer.state[weight][AVERAGE])
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)
