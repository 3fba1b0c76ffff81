"""Norms of the gradients of every micro-batch and of their mean, on one rank or on data-parallel ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.batch_size.gradient_norms import (
    GradientNorms,
    Grouping,
    NormSums,
    gradient_norm,
    own_part,
    squares,
)


class MicroBatchNoise:
    """Norms of the micro-batch gradients of one worker, without a copy of a gradient.

    A hook on each parameter reads the gradient of a micro-batch before autograd adds it to `.grad`, while it is
    still in the processor's cache. Cost: one read of every gradient and one kernel per parameter and micro-batch,
    one read of `.grad` per step. For whole parameters: not for sharded (see `ShardNoise`) or sparse ones. One
    backward call is one micro-batch.

    Under DDP the micro-batch norms are this rank's, average them over ranks; `.grad` is the mean of all ranks, and
    the big batch is that of all ranks. Ranks that do not accumulate have one micro-batch each. All n gradients of b
    examples of a step are used, and of their quadratic forms that are unbiased whatever the noise's covariance,
    the pair (mean of their squares, square of their mean) has the least variance if the noise is normal: norms
    of sums of several micro-batches add nothing.

    Args:
        parameters: of the model; each counts once, frozen ones do not.
        groups: of parameters, measured apart as well; see `Grouping`.

    Reference: McCandlish et al., 2018, arXiv 1812.06162, appendix A.1.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, groups: Sequence[Iterable[nn.Parameter]] = ()
    ) -> None:
        self._grouping = Grouping(parameters, groups)
        self._sums = NormSums(len(self._grouping.parameters))
        self._handles: list[Any] = [
            parameter.register_hook(functools.partial(self._sums.record, number))
            for number, parameter in enumerate(self._grouping.parameters)
        ]

    @torch.no_grad()
    def observation(
        self,
        *,
        num_micro_batches: int,
        loss_factor: float | Sequence[float],
        rank: int = 0,
        world_size: int = 1,
    ) -> GradientNorms:
        """Norms since the last call; call it after the last micro-batch, before clipping or `zero_grad`.

        With c_i the factor on the loss of micro-batch i and h_i = c_i g_i the gradients that the hooks saw:

            small_sqnorm = sum_i |h_i|^2 / sum_i c_i^2        big_sqnorm = |.grad|^2 / (sum_i c_i)^2

        Args:
            num_micro_batches: k, since `.grad` was zeroed.
            loss_factor: c, the same for all; 1/k where each loss was divided by the number of micro-batches, 1
                where not, times the loss scale of mixed precision if `.grad` is still scaled. Or all c_i,
                where micro-batches are uneven; `equivalent_batches` then has the sizes.
            rank: with `world_size` > 1 the big norms are of this rank's part of `.grad` alone, to be added up over
                the ranks: none reads what another reads.
            world_size: that share the reading.

        Raises:
            ValueError: num_micro_batches < 1, or a loss_factor not positive.
            RuntimeError: no gradient came since the last call, or those of more backward calls than micro-batches.
        """
        factors = loss_factors(num_micro_batches, loss_factor)
        parameters = self._grouping.parameters
        gradients = [None if p.grad is None else own_part(p.grad, rank, world_size) for p in parameters]
        return norms_of_step(self._grouping, self._sums, gradients, factors)

    def pause(self, *, is_paused: bool) -> None:
        """Leave the gradients of the backward calls that follow unread, or read them again."""
        self._sums.is_paused = is_paused

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()


def loss_factors(num_micro_batches: int, loss_factor: float | Sequence[float]) -> list[float]:
    """One factor a micro-batch.

    Raises:
        ValueError: num_micro_batches < 1, another number of factors, or one not positive.
    """
    one_for_all = isinstance(loss_factor, int | float)
    factors = [float(loss_factor)] * num_micro_batches if one_for_all else list(loss_factor)
    if num_micro_batches < 1 or len(factors) != num_micro_batches or not all(c > 0 for c in factors):
        raise ValueError(
            f"need num_micro_batches >= 1 and loss_factor > 0, got {num_micro_batches!r}, {loss_factor!r}"
        )
    return factors


def norms_of_step(
    grouping: Grouping, sums: NormSums, gradients: Sequence[Tensor | None], factors: Sequence[float]
) -> GradientNorms:
    """What came in since the last step beside the step's gradients; see `MicroBatchNoise.observation`.

    Args:
        grouping: of the parameters.
        sums: what the hooks saw.
        gradients: of the step, or this rank's parts of them, in the order of the parameters.
        factors: on the losses, one a micro-batch.

    Raises:
        RuntimeError: nothing came, or more than `factors` tells of.
    """
    device = grouping.parameters[0].device if grouping.parameters else torch.device("cpu")
    small, num_seen = sums.take(device)
    if num_seen == 0:
        raise RuntimeError("no gradients have come since the last observation: run backward first")
    if num_seen > len(factors):
        raise RuntimeError(
            f"gradients of {num_seen} backward calls have come since the last observation, of {len(factors)} "
            "micro-batches: call backward once for each, and observe every step"
        )
    big = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    there = [number for number, gradient in enumerate(gradients) if gradient is not None]
    if there:
        norms = [gradient_norm(gradient).to(device) for gradient in gradients if gradient is not None]
        big[there] = squares(norms)
    return GradientNorms(
        grouping.add_up(small) / sum(c**2 for c in factors), grouping.add_up(big) / sum(factors) ** 2
    )
