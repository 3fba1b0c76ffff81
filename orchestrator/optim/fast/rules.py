"""What one step does to a tensor, as the coefficients of a linear form: all that a fast implementation knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Scalar = float | torch.Tensor
"""A number, or a 0-dim tensor where the rate is one."""


@dataclass(frozen=True)
class AdamRule:
    """A step of the family of Adam, with or without layer adaptation and LookAhead.

        m <- beta1 m + gradient1 g,   v <- beta2 v + gradient2 g^2,   d = m / (scale sqrt(v) + offset)
        x = normed_direction d + normed_moment m + normed_weight w
        ratio = min(norm_scale ||w||, largest_norm) / ||x||       1 if a norm is 0, or is_adapted is off
        w <- keep w - rate ratio (direction d + moment m + weight w)
        slow <- slow + slow_step (w - slow),  w <- slow           if slow_step > 0

    `direction` and `moment` are not both set, nor are `normed_direction` and `normed_moment`; the moments of a
    tensor whose `is_adapted` is off are used once, so its `normed_` numbers mean nothing.

    The order of the fields is that of the structure in layerwise.cpp.
    """

    beta1: float
    gradient1: float
    beta2: float
    gradient2: float
    scale: float
    offset: float
    normed_direction: Scalar
    normed_moment: Scalar
    normed_weight: Scalar
    keep: Scalar
    rate: Scalar
    direction: float
    moment: float
    weight: float
    slow_step: float
    is_adapted: bool
    largest_norm: float = float("inf")
    norm_scale: Scalar = 1.0


@dataclass(frozen=True)
class LarsRule:
    """A step of LARS, with u = sign g + decay w.

        ratio = trust ||w|| / (||g|| + decay ||w||)               1 if a norm is 0, or is_adapted is off
        buffer <- momentum buffer + term ratio u                  if there is a momentum
        w <- w - along_buffer buffer - along_term ratio u

    The order of the fields is that of the structure in layerwise.cpp.
    """

    momentum: float
    term: Scalar
    sign: float
    decay: float
    along_buffer: Scalar
    along_term: Scalar
    trust: float
    is_adapted: bool


Rule = AdamRule | LarsRule
