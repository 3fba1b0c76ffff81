"""Learning-rate schedules: a linear warm-up, then constant, polynomial decay or a cosine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Schedule(Protocol):
    """A learning-rate schedule: one call before each step, and a state that a checkpoint keeps."""

    def move_to(self, place: float, *, batch_factor: float = 1.0) -> None:
        """Set the rates of the step that begins at a place of the run, counted in steps.

        Args:
            place: steps of the base batch that are done; between two where the batch has grown.
            batch_factor: of the rates, for the size of its batch.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from what `state_dict` returned."""
        ...


class PlacedLR(LambdaLR):
    """Torch's LambdaLR that goes by the place in the run instead of the number of calls."""

    def move_to(self, place: float, *, batch_factor: float = 1.0) -> None:
        """See `Schedule`."""
        at = cast(int, place)  # torch says int, and hands it to the factor alone
        self.last_epoch = at
        for group, base_rate, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas):
            rate = base_rate * factor(at) * batch_factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


Decay = Callable[[float, float], float]
"""Progress in [0, 1] since the warm-up, power -> factor in [0, 1]."""


def _constant(progress: float, power: float) -> float:
    return 1.0


def _polynomial(progress: float, power: float) -> float:
    return (1.0 - progress) ** power


def _cosine(progress: float, power: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: Mapping[str, Decay] = {"constant": _constant, "polynomial": _polynomial, "cosine": _cosine}


WARMUP_FRACTION = 0.1


def num_warmup_steps(total_steps: int, warmup_fraction: float) -> int:
    """Steps of the warm-up: the fraction rounded, at least one unless the fraction is 0.

    >>> num_warmup_steps(100, 0.1), num_warmup_steps(3, 0.1), num_warmup_steps(100, 0.0)
    (10, 1, 0)
    """
    return max(1, round(warmup_fraction * total_steps)) if warmup_fraction > 0 else 0


def rate_factor(
    step: float,
    *,
    name: str,
    total_steps: int,
    warmup_fraction: float = WARMUP_FRACTION,
    warmup_start: float = 1 / 20,
    power: float = 2.0,
    final_fraction: float = 0.0,
) -> float:
    """Factor of the base rate in one step.

    With W steps of warm-up, T in all, and progress x = (t - W) / (T - W), held at 1 from t = T on:

        t < W:   warmup_start + (1 - warmup_start) t / W
        t >= W:  final_fraction + (1 - final_fraction) d(x)
        d(x) =   1  |  (1 - x)^power  |  (1 + cos(pi x)) / 2

    Args:
        step: t, from 0; below T while the run trains.
        name: "constant", "polynomial" or "cosine".
        total_steps: T.
        warmup_fraction: W / T, see `num_warmup_steps`.
        warmup_start: factor at t = 0 if there is a warm-up.
        power: of the polynomial; 2 as in LARS.
        final_fraction: factor that the decay ends at; a constant schedule has none.

    >>> [rate_factor(t, name="polynomial", total_steps=20) for t in (0, 1, 2, 11, 20)]
    [0.05, 0.525, 1.0, 0.25, 0.0]

    Reference: You, Gitman and Ginsburg, 2017, arXiv 1708.03888, section 5 (polynomial, power 2); Loshchilov
        and Hutter, 2017, arXiv 1608.03983, equation 5 (cosine); Goyal et al., 2017, arXiv 1706.02677, section
        2.2 (warm-up).
    """
    warmup = num_warmup_steps(total_steps, warmup_fraction)
    if step < warmup:
        return warmup_start + (1.0 - warmup_start) * step / warmup
    # A warm-up of all steps leaves nothing to decay in: the rate ends where the decay would.
    progress = min(1.0, (step - warmup) / (total_steps - warmup)) if total_steps > warmup else 1.0
    return final_fraction + (1.0 - final_fraction) * DECAYS[name](progress, power)


def build_schedule(
    optimizer: Optimizer,
    *,
    name: str,
    total_steps: int,
    first_step: int = 0,
    warmup_fraction: float = WARMUP_FRACTION,
    warmup_start: float = 1 / 20,
    power: float = 2.0,
    final_fraction: float = 0.0,
) -> PlacedLR:
    """A torch scheduler of `rate_factor` over the rates that the groups have now; step or move it every step.

    Its state_dict holds the step and the base rates, in plain numbers. The schedule's own settings are the
    ones given here, also after load_state_dict: a run that is resumed with another `total_steps` follows the
    new one.

    Args:
        optimizer: each group's rate is the one reached at the end of the warm-up.
        name: "constant", "polynomial" or "cosine".
        total_steps: steps in the whole run.
        first_step: steps of the run that are done already, by another optimizer.
        warmup_fraction: in [0, 1].
        warmup_start: in [0, 1].
        power: > 0.
        final_fraction: in [0, 1].

    Raises:
        ValueError: unknown name, or a value out of its range.
    """
    if name not in DECAYS:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(sorted(DECAYS))}")
    if not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be an integer >= 1, got {total_steps!r}")
    fractions = {
        "warmup_fraction": warmup_fraction,
        "warmup_start": warmup_start,
        "final_fraction": final_fraction,
    }
    for key, value in fractions.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{key} must be in [0, 1], got {value!r}")
    if not 0.0 < power < math.inf:
        raise ValueError(f"power must be in (0, inf), got {power!r}")
    factor = functools.partial(rate_factor, name=name, total_steps=total_steps, power=power, **fractions)
    for group in optimizer.param_groups if first_step else []:
        group["initial_lr"] = group["lr"]
    return PlacedLR(optimizer, factor, last_epoch=first_step - 1)
