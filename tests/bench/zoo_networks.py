"""Networks of the zoo that no library on the shelf gives: a diffusion U-Net, and recurrent language models."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU and convolution twice, the time added between them, a shortcut around all."""

    def __init__(self, inputs: int, outputs: int, *, time_width: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_width, outputs))
        self.second = nn.Sequential(
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, images: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] and [B, time_width] -> [B, outputs, H, W]."""
        here = self.first(images) + self.time(time)[:, :, None, None]
        return self.shortcut(images) + self.second(here)


class SelfAttention(nn.Module):
    """Attention between the pixels of an image, added to it."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, D, H, W] -> the same shape."""
        B, D, H, W = images.shape
        qkv = self.qkv(self.norm(images)).reshape(B, 3, self.heads, D // self.heads, H * W)
        query, key, value = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, H W, D / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return images + self.out(mixed.transpose(-1, -2).reshape(B, D, H, W))


class DiffusionUNet(nn.Module):
    """Noise predictor of denoising diffusion: a U-Net of residual blocks that knows the time.

    Two residual blocks a level, self-attention at the lowest resolution, every block of the way down handed over
    to its mirror image on the way up.

    Args:
        width: channels of the highest resolution, a multiple of 8; each level has twice those of the one above.
        levels: number of resolutions.
        heads: of the self-attention.
        dropout: within each residual block.

    Reference: Ho, Jain and Abbeel, 2020, Denoising diffusion probabilistic models, appendix B.
    """

    def __init__(self, width: int = 48, levels: int = 3, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        time_width = 4 * width
        widths = [width * 2**level for level in range(levels)]
        self.time = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.stem = nn.Conv2d(3, width, 3, padding=1)

        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, time_width=time_width, dropout=dropout)

        above = [width, *widths[:-1]]
        self.down = nn.ModuleList(
            [nn.ModuleList([block(a, b), block(b, b)]) for a, b in zip(above, widths, strict=True)]
        )
        self.halve = nn.ModuleList([nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1]])
        self.middle = nn.ModuleList([block(widths[-1], widths[-1]), block(widths[-1], widths[-1])])
        self.attention = SelfAttention(widths[-1], heads=heads)
        self.up = nn.ModuleList(
            [nn.ModuleList([block(2 * b, b), block(2 * b, a)]) for a, b in zip(above, widths, strict=True)][
                ::-1
            ]
        )
        self.twice = nn.ModuleList([nn.Conv2d(w, w, 3, padding=1) for w in widths[:-1]][::-1])
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] and their times [B] -> the noise [B, 3, H, W]."""
        time = self.time(sinusoids(times, width=self.width))
        skips: list[torch.Tensor] = []
        here = self.stem(noisy)
        for level, blocks in enumerate(self.down):
            here = here if level == 0 else self.halve[level - 1](here)
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                here = block(here, time)
                skips.append(here)
        here = self.middle[1](self.attention(self.middle[0](here, time)), time)
        for level, blocks in enumerate(self.up):
            if level > 0:
                here = self.twice[level - 1](F.interpolate(here, scale_factor=2.0))
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                here = block(torch.cat((here, skips.pop()), dim=1), time)
        return self.head(here)


def sinusoids(times: torch.Tensor, *, width: int) -> torch.Tensor:
    """Times [B] as sines and cosines [B, width] of width / 2 frequencies from 1 down to 1 / 10000."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=times.device) * (-math.log(10000.0) / (half - 1)))
    angles = times[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def noised(
    images: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, *, num_times: int = 1000
) -> torch.Tensor:
    """Images after t steps of diffusion, with the linear variances of Ho et al. (2020), equation 4.

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,   a_t = prod_{s <= t} (1 - b_s)

    Args:
        images: x_0, [B, 3, H, W].
        noise: standard normal, the same shape.
        times: t of each image, [B], whole numbers below `num_times`.
        num_times: steps over which b rises from 0.0001 to 0.02.

    Returns:
        x_t, the same shape.
    """
    kept = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, num_times), dim=0)[times][:, None, None, None]
    return kept.sqrt() * images + (1.0 - kept).sqrt() * noise


class RecurrentLM(nn.Module):
    """Language model of a recurrent network: embedding, LSTM or GRU layers, a linear head.

    Args:
        cell: kind of the layers.
        vocabulary: number of tokens.
        width: of the embedding and of the state.
        layers: number of recurrent layers.
        dropout: between the layers, after the embedding and before the head.
        tied: the head has the embedding's weights (Press and Wolf, 2017).
    """

    def __init__(
        self,
        cell: Literal["lstm", "gru"] = "lstm",
        vocabulary: int = 2000,
        width: int = 256,
        layers: int = 2,
        dropout: float = 0.1,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        recurrent = nn.LSTM if cell == "lstm" else nn.GRU
        self.recurrent = recurrent(width, width, num_layers=layers, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] -> logits [B, T, vocabulary]."""
        states, _ = self.recurrent(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(states))
