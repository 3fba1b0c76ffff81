"""Steps of small networks whose operations stand for those of most models: what is measured without a job."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from planner.capture import Captured, capture
from planner.lower.fakes import building_without_memory


class _TransformerBlock(nn.Module):
    """Attention and a feed-forward network, with dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, tokens, width) -> the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))


class _LanguageModel(nn.Module):
    """Embedding, one block, logits."""

    def __init__(self, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = _TransformerBlock(width, heads)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (batch, tokens) -> logits (batch * tokens, vocabulary)."""
        return self.head(self.block(self.embedding(tokens))).flatten(0, 1)


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(8, 2 * width),
        nn.SiLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
        nn.BatchNorm2d(2 * width),
        nn.Sigmoid(),
        nn.Conv2d(2 * width, width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
        nn.Softmax(dim=-1),
    )


def standard_steps(device: torch.device) -> Iterator[Captured]:
    """Captured steps from small to as large as a CPU measures in a moment; sixteen times larger on a GPU."""
    scale = 1 if device.type == "cpu" else 4
    with building_without_memory(), torch.device(device):
        for width, heads, tokens in ((64, 2, 32), (256, 4, 64), (512, 8, 128), (768, 12, 256)):
            model = _LanguageModel(width * scale, heads * scale, vocabulary=8 * width).train()
            words = torch.zeros(2, tokens * scale, dtype=torch.int64)
            yield capture(model, (words, words.flatten()), loss=F.cross_entropy)
        for width, size in ((16, 32), (64, 64), (128, 128)):
            model = _convolutions(width).train()
            images = torch.zeros(4 * scale * scale, 3, size, size)
            yield capture(model, (images, torch.zeros(len(images), dtype=torch.int64)), loss=F.cross_entropy)
