"""Norms of the gradients of every micro-batch and of their mean, on ranks that share a model (FSDP2)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orchestrator.batch_size.gradient_norms import GradientNorms, Grouping, NormSums
from orchestrator.batch_size.micro_batch_noise import loss_factors, norms_of_step


class ShardNoise:
    """Norms of the micro-batch gradients of ranks that share a model, without a copy of a gradient.

    FSDP2 gives a module its whole parameters for forward and backward. A hook on each reads this rank's gradient of
    one micro-batch, before it is reduced or added to the rank's own; afterwards `.grad` holds this rank's share of
    the mean over all ranks:

        small_sqnorm = mean over ranks and micro-batches of |gradient of one|^2
        big_sqnorm = sum over ranks of |share of .grad|^2

    The whole parameters do not exist before the first forward, so they are hooked there. Reduction, its dtype and
    its factors stay as they are.

    Args:
        module: sharded by `fully_shard`, before its first forward.
        groups: of its (sharded) parameters, measured apart as well; see `Grouping`.
    """

    def __init__(self, module: nn.Module, *, groups: Sequence[Iterable[nn.Parameter]] = ()) -> None:
        self._grouping = Grouping(module.parameters(), groups)
        self._sums = NormSums(len(self._grouping.parameters))
        self._handles: list[Any] = []
        self._hooked: dict[int, nn.Parameter] = {}
        number_of = {parameter: number for number, parameter in enumerate(self._grouping.parameters)}
        # Where each parameter hangs: its attribute holds the whole one while FSDP2 has gathered it.
        places = [
            (owner, name, number_of[parameter])
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter in number_of
        ]
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                within = set(unit.modules())
                own = [place for place in places if place[0] in within]
                # After FSDP2's own hook, which gathers and was registered before.
                self._handles.append(
                    unit.register_forward_pre_hook(functools.partial(self._hook_gathered, own))
                )

    def _hook_gathered(
        self, places: list[tuple[nn.Module, str, int]], module: nn.Module, inputs: Any
    ) -> None:
        for owner, name, number in places:
            parameter = getattr(owner, name)
            if isinstance(parameter, DTensor) or self._hooked.get(number) is parameter:
                continue
            self._hooked[number] = parameter
            self._handles.append(parameter.register_hook(functools.partial(self._sums.record, number)))

    @torch.no_grad()
    def observation(self, *, num_micro_batches: int, loss_factor: float | Sequence[float]) -> GradientNorms:
        """This rank's norms since the last call: of its micro-batches, and of its share of `.grad`.

        Average the small ones over the ranks and add up the big ones. Arguments and errors are those of
        `MicroBatchNoise.observation`.
        """
        factors = loss_factors(num_micro_batches, loss_factor)
        gradients: list[Tensor | None] = [
            gradient.to_local() if isinstance(gradient := parameter.grad, DTensor) else gradient
            for parameter in self._grouping.parameters
        ]
        return norms_of_step(self._grouping, self._sums, gradients, factors)

    def pause(self, *, is_paused: bool) -> None:
        """Leave the gradients of the backward calls that follow unread, or read them again."""
        self._sums.is_paused = is_paused

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
