"""Squared norms of gradients, parameter by parameter and added up by group: what noise is measured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """What one step says about the noise, for `NoiseScaleEstimator.observe`.

    Attributes:
        small_by_group: mean squared norm of the small-batch gradients, float64, one number a parameter group.
        big_by_group: squared norm of their mean, likewise.
    """

    small_by_group: Tensor
    big_by_group: Tensor

    @property
    def small_sqnorm(self) -> Tensor:
        """Of all groups together: squared norms add up. 0-dim."""
        return self.small_by_group.sum()

    @property
    def big_sqnorm(self) -> Tensor:
        """Of all groups together, 0-dim."""
        return self.big_by_group.sum()


def gradient_norm(gradient: Tensor) -> Tensor:
    """L2 norm, 0-dim, on the same device: one kernel, no copy; 16-bit tensors accumulate in float32.

    Raises:
        ValueError: a sparse gradient.
    """
    if gradient.layout != torch.strided:
        raise ValueError(
            "the noise scale needs dense gradients; got a sparse one (nn.Embedding: sparse=False)"
        )
    is_16_bit = gradient.dtype in (torch.float16, torch.bfloat16)
    return torch.linalg.vector_norm(gradient, dtype=torch.float32 if is_16_bit else None)


def squares(norms: Sequence[Tensor]) -> Tensor:
    """Squares of 0-dim norms on one device, in float64: one stack for all of them. Shape [len(norms)]."""
    dtypes = {norm.dtype for norm in norms}
    alike = norms if len(dtypes) == 1 else [norm.double() for norm in norms]
    return torch.stack(list(alike)).double().square_()


def squared_norm(tensor: Tensor) -> Tensor:
    """Squared L2 norm as a 0-dim float64 tensor on the same device."""
    return gradient_norm(tensor).double().square()


def own_part(gradient: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's part of a gradient that all ranks have alike: the parts of all ranks are the whole.

    Cut along dim 0, without a copy; what has no dim is the first rank's.
    """
    if world_size == 1:
        return gradient
    length = gradient.shape[0] if gradient.ndim else 1
    start, end = rank * length // world_size, (rank + 1) * length // world_size
    if gradient.ndim:
        return gradient[start:end]
    return gradient.reshape(1)[start:end]


class Grouping:
    """In which group each parameter counts: once, and not at all where it is frozen.

    Args:
        parameters: all that count; a shared one may be listed again.
        groups: of some or all of them, such as those of an optimizer; a parameter of several counts in the first.
            Those in none of them are one more group, the last.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], groups: Sequence[Iterable[nn.Parameter]] = ()
    ) -> None:
        self.parameters = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        number_of: dict[nn.Parameter, int] = {}
        for number, members in enumerate(groups):
            for parameter in members:
                number_of.setdefault(parameter, number)
        others = any(parameter not in number_of for parameter in self.parameters)
        self.num_groups = max(1, len(groups) + others)
        self.group_of = [number_of.get(parameter, self.num_groups - 1) for parameter in self.parameters]

    def add_up(self, by_parameter: Tensor) -> Tensor:
        """Numbers of the parameters, in their order -> sums of the groups; float64, shapes [P] -> [groups]."""
        index = torch.tensor(self.group_of, dtype=torch.int64, device=by_parameter.device)
        sums = torch.zeros(self.num_groups, dtype=torch.float64, device=by_parameter.device)
        return sums.index_add_(0, index, by_parameter)


class NormSums:
    """Sums of squared norms of the gradients that come in, parameter by parameter and backward by backward.

    The norms of one backward wait as they are and are squared and added together when the next backward begins:
    a few kernels for all parameters. Nothing is synchronized.

    Args:
        num_parameters: whose gradients come in, numbered from 0.
    """

    def __init__(self, num_parameters: int) -> None:
        self._num_parameters = num_parameters
        self._waiting: dict[int, Tensor] = {}
        self._sums: dict[torch.device, Tensor] = {}
        self._num_backwards = 0
        self.is_paused = False
        """Whether gradients that come in are left unread."""

    def record(self, number: int, gradient: Tensor) -> None:
        """Take in one parameter's gradient; a second one of the same parameter begins another backward."""
        if self.is_paused:
            return
        if number in self._waiting:
            self._fold()
        self._waiting[number] = gradient_norm(gradient.detach())

    def take(self, device: torch.device) -> tuple[Tensor, int]:
        """Sums since the last call, float64, shape [num_parameters], and of how many backward calls."""
        self._fold()
        total = torch.zeros(self._num_parameters, dtype=torch.float64, device=device)
        for part in self._sums.values():
            total += part.to(device)
        num_backwards = self._num_backwards
        self._sums, self._num_backwards = {}, 0
        return total, num_backwards

    def _fold(self) -> None:
        if not self._waiting:
            return
        self._num_backwards += 1
        # In the order of the parameters, whatever order the gradients came in.
        numbers = sorted(self._waiting)
        for device in dict.fromkeys(self._waiting[number].device for number in numbers):
            here = [number for number in numbers if self._waiting[number].device == device]
            if device not in self._sums:
                self._sums[device] = torch.zeros(self._num_parameters, dtype=torch.float64, device=device)
            values = squares([self._waiting[number] for number in here])
            if len(here) == self._num_parameters:
                self._sums[device] += values
            else:
                self._sums[device].index_add_(0, torch.tensor(here, device=device), values)
        self._waiting = {}


def equivalent_batches(examples: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The batch sizes that unevenly filled gradients stand for.

    Gradients g_i, each a mean over n_i examples, enter the step as h_i = a_i g_i. With

        b = sum a_i^2 / sum(a_i^2 / n_i)        B = (sum a_i)^2 / sum(a_i^2 / n_i)

    E sum |h_i|^2 / sum a_i^2 = |G|^2 + tr(Sigma) / b and E |sum h_i|^2 / (sum a_i)^2 = |G|^2 + tr(Sigma) / B, so
    `unbiased_moments` with these two sizes is unbiased. Equal sizes and weights give b = n and B = k n.

    Args:
        examples: n_i, all > 0.
        weights: a_i: the examples themselves where the step is the mean over all examples, equal numbers where
            each rank or micro-batch counts alike.

    Returns:
        (b, B).

    Raises:
        ValueError: no gradients, another number of weights, or one that is not positive.

    >>> equivalent_batches([4, 4], [0.5, 0.5])
    (4.0, 8.0)
    >>> [round(batch, 3) for batch in equivalent_batches([4, 1], [4, 1])]  # the mean over 5 examples
    [3.4, 5.0]
    """
    if not examples or len(examples) != len(weights) or min(*examples, *weights) <= 0:
        raise ValueError(f"need as many positive weights as batches, got {weights!r} for {examples!r}")
    spread = sum(weight**2 / size for weight, size in zip(weights, examples))
    return sum(weight**2 for weight in weights) / spread, sum(weights) ** 2 / spread
