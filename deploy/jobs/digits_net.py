"""A small convolutional network with group norm, and scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset


def digits_net(width: int = 32, classes: int = 10) -> nn.Sequential:
    """Logits (batch, classes) of images (batch, 1, 8, 8)."""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, width, 1),
        *stage(width, width, 1),
        *stage(width, 2 * width, 2),
        *stage(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def digits(validation_every: int = 5) -> tuple[Subset, Subset]:
    """Training and validation images, one in `validation_every` of the latter; scaled by the former."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn is missing; install it with pip install 'lowtide[digits]'"
        ) from error

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    held_out = torch.arange(len(images)) % validation_every == 0
    mean, deviation = images[~held_out].mean(), images[~held_out].std()
    data = TensorDataset(_normalized(images, mean, deviation), torch.tensor(labels, dtype=torch.int64))
    return Subset(data, (~held_out).nonzero().flatten().tolist()), Subset(
        data, held_out.nonzero().flatten().tolist()
    )


def _normalized(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return (images - mean) / deviation
