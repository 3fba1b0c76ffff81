"""A byte-level GPT, and as its text the Python files of the running interpreter's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

# B batch, T tokens, D model, H heads, K features of a head, V values of a byte
V = 256


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix over tokens, then over features."""
        batch, tokens, width = x_BTD.shape
        heads = self.query_key_value(self.norm_attention(x_BTD)).view(batch, tokens, 3, self.heads, -1)
        query_BHTK, key_BHTK, value_BHTK = heads.permute(2, 0, 3, 1, 4)
        mixed_BHTK = F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, is_causal=True)
        x_BTD = x_BTD + self.project(mixed_BHTK.transpose(1, 2).reshape(batch, tokens, width))
        return x_BTD + self.contract(F.gelu(self.expand(self.norm_mlp(x_BTD))))


class ByteGPT(nn.Module):
    """Predicts the next byte from those before it; the output layer shares the embedding's weights."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed_byte = nn.Embedding(V, width)
        self.embed_position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(self._initialize)
        for block in self.blocks:  # keep the variance of the residual stream independent of the depth
            for layer in (block.project, block.contract):
                nn.init.normal_(layer.weight, std=0.02 / (2 * layers) ** 0.5)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Logits of the next byte at each position, shape (B, T, V)."""
        positions_T = torch.arange(bytes_BT.shape[1], device=bytes_BT.device)
        x_BTD = self.embed_byte(bytes_BT) + self.embed_position(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.embed_byte.weight)


def next_byte_loss(logits_BTV: Tensor, bytes_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), bytes_BT.flatten())


class Windows(Dataset):
    """Consecutive windows of a text; the target is the window one byte later."""

    def __init__(self, text: bytes, context: int) -> None:
        self.bytes_N = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes_N) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.bytes_N[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def python_source(context: int, max_bytes: int = 8_000_000) -> tuple[Windows, Windows]:
    """Training and validation windows of the standard library's source; no file is in both.

    A file's part is decided by the hash of its path, so it never depends on the other files: one in twenty
    validates. Files are taken in the order of that hash until `max_bytes` are reached.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = []
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if skipped.isdisjoint(name.parts):
            files.append((hashlib.sha256(name.as_posix().encode()).digest(), path))
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    total = 0
    for digest, path in sorted(files):
        text = path.read_bytes()
        if total + len(text) > max_bytes:
            break
        total += len(text)
        texts[digest[0] % 20 == 0].append(text)
    if not texts[True] or not texts[False]:
        raise FileNotFoundError(
            f"no Python source files under {library}; install Python's standard library as source"
        )
    return Windows(b"\n".join(texts[False]), context), Windows(b"\n".join(texts[True]), context)
