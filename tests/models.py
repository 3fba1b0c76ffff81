"""Small models that meet what real ones do: attention, batch norm, dropout, tied weights, unusual signatures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(x.shape)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class TinyGPT(nn.Module):
    """A language model over 64 tokens; its head may share the embedding's weight."""

    def __init__(self, *, width: int = 32, layers: int = 3, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 64, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BatchNormNet(nn.Module):
    """Convolutions with batch norm and in-place activations, a skip connection, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
                for _ in range(4)
            )
        )
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for layer in self.body:
            x = x + layer(x)
        return self.head(self.drop(x.mean((2, 3))))


class Unusual(nn.Module):
    """Named inputs, a dict of outputs with a view and a constant, a frozen and an unused parameter, a counter."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 64)
        self.b = nn.Linear(64, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, *, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        self.steps += 1
        h = x
        for _ in range(4):
            h = h + torch.tanh(self.b(F.gelu(self.a(h))) * scale)
        h = h + self.frozen(x)
        return {"out": h, "row": h[0], "aux": (h.mean(), None), "name": "unusual"}


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def unusual_loss(outputs: dict[str, Any], target: torch.Tensor) -> torch.Tensor:
    """Reads two of the outputs; the view gets no gradient."""
    return F.mse_loss(outputs["out"], target) + outputs["aux"][0] ** 2
