"""GPT-2 small of transformers, as a workload for benchmarks: the model, and its loss on next tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def gpt2_small(*, layers: int = 12, dropout: float = 0.0) -> nn.Module:
    """GPT-2 small with random weights, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False
    )
    return GPT2LMHeadModel(config).train()


def next_token_loss(outputs: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token given those before it."""
    logits = outputs.logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
