"""The models of the planner's benchmarks, with their batches and losses."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.bench.gpt2_small import gpt2_small, next_token_loss


class UNet(nn.Module):
    """U-Net of four levels (Ronneberger et al., 2015), same-padded, without normalization."""

    def __init__(self, width: int = 64, levels: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList([_twice(a, b) for a, b in zip([3, *widths], widths, strict=False)])
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths)][::-1]
        )
        self.merge = nn.ModuleList([_twice(2 * a, a) for a in widths[:-1]][::-1])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, 1, H, W]."""
        skips: list[torch.Tensor] = []
        here = images
        for level, block in enumerate(self.down):
            here = block(here if level == 0 else F.max_pool2d(here, 2))
            skips.append(here)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            here = merge(torch.cat((up(here), skips.pop()), dim=1))
        return self.head(here)


def _twice(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


def build(name: str, *, layers: int | None = None) -> tuple[nn.Module, Any, Any, Any]:
    """Model, inputs, targets and loss of a benchmark's name; `layers` replaces Llama's 32.

    Raises:
        ImportError: its library is not installed.
        KeyError: no such name.
    """

    def tokens(rows: int, length: int) -> torch.Tensor:
        return torch.empty(rows, length, dtype=torch.int64)

    def images(count: int, height: int, width: int) -> torch.Tensor:
        return torch.empty(count, 3, height, width)

    if name in ("vit-b", "resnet50"):
        count = 64 if name == "vit-b" else 128
        classes = torch.empty(count, dtype=torch.int64)
        if name == "vit-b":
            import timm

            return (
                timm.create_model("vit_base_patch16_224"),
                images(count, 224, 224),
                classes,
                F.cross_entropy,
            )
        import torchvision

        return torchvision.models.resnet50(), images(count, 224, 224), classes, F.cross_entropy
    if name == "u-net":
        return UNet(), images(8, 416, 608), torch.empty(8, 1, 416, 608), F.mse_loss
    if name == "gpt2-small":
        return gpt2_small(), tokens(8, 1024), tokens(8, 1024), next_token_loss
    import transformers as hf

    if name == "gpt2-xl":
        config = hf.GPT2Config(
            n_layer=48,
            n_embd=1600,
            n_head=25,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        return hf.GPT2LMHeadModel(config), tokens(8, 1024), tokens(8, 1024), next_token_loss
    if name == "llama-32":
        return (
            hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, num_hidden_layers=layers or 32)),
            tokens(8, 2048),
            tokens(8, 2048),
            next_token_loss,
        )
    if name == "bert-base":
        config = hf.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return hf.BertForMaskedLM(config), tokens(32, 512), tokens(32, 512), next_token_loss
    raise KeyError(name)
