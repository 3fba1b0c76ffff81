"""Models whose examples are coupled by batch norm: found, and frozen while the noise is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from orchestrator.techniques.normalization import ALL_BATCH_NORMS


def coupling_layers(module: nn.Module) -> list[str]:
    """Names of the layers that normalize by statistics of the batch: batch norm, synchronized too, unless frozen.

    Frozen is a layer in eval mode that has running statistics. Functional batch norm is not seen.
    """
    return [
        name or type(part).__name__
        for name, part in module.named_modules()
        if isinstance(part, ALL_BATCH_NORMS) and (part.training or part.running_mean is None)
    ]


def refusal(layers: list[str]) -> str:
    """Why the noise scale of a model with such layers is not measured; a sentence without its full stop."""
    return (
        f"batch norm ({layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}) couples the examples "
        "of a micro-batch: its gradient is no mean over independent examples and changes with the size of the "
        "micro-batch, so norms at two sizes do not give tr(Sigma) and |G|^2; measure with frozen statistics "
        "(.eval() of these layers), or use group norm"
    )


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norm use its running statistics inside, and leave them as they are: examples are then independent.

    What is measured is the noise of the loss that evaluation sees; it needs statistics that training has made.

    Raises:
        ValueError: a layer has no running statistics.
    """
    layers = {name: part for name, part in module.named_modules() if isinstance(part, ALL_BATCH_NORMS)}
    without = [name or type(part).__name__ for name, part in layers.items() if part.running_mean is None]
    if without:
        raise ValueError(
            f"batch norm {without[0]!r} keeps no running statistics (track_running_stats=False), so there are none "
            "to freeze; use group norm"
        )
    modes = [(part, part.training) for part in layers.values()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
