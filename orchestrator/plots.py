"""Figures of a run: its loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from orchestrator.metrics import Event

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes as well.
_TRAINING = "#56B4E9"
_SMOOTHED = "#0072B2"
_VALIDATION = "#D55E00"
_SMOOTHING = 0.9


def loss_figure(events: list[Event]) -> Figure:
    """Training loss over steps, its running mean, and the validation losses.

    Args:
        events: of the run, as metrics.jsonl keeps them.
    """
    from matplotlib.figure import Figure

    steps = [event for event in events if event["event"] == "step"]
    validations = [event for event in events if event["event"] == "validation"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    places = [event["step"] for event in steps]
    losses = [math.nan if event["loss"] is None else event["loss"] for event in steps]
    axes.plot(places, losses, color=_TRAINING, linewidth=0.8, label="training, each step")
    axes.plot(places, running_mean(losses), color=_SMOOTHED, label="training, running mean")
    axes.plot(
        [event["step"] for event in validations],
        [event["loss"] for event in validations],
        color=_VALIDATION,
        marker="o",
        label="validation",
    )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def running_mean(values: list[float]) -> list[float]:
    """Exponential mean that counts the first values fully.

    >>> running_mean([2.0, 2.0])
    [2.0, 2.0]
    """
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        means.append(total / weight)
    return means
