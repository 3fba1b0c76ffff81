"""Language models that no small machine can hold, as workloads that are sized and never built."""

from __future__ import annotations

from torch import nn


def gpt2_xl() -> nn.Module:
    """GPT-2 XL of transformers in float32, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25, use_cache=False)).train()


def llama_7b() -> nn.Module:
    """Llama with 7 billion parameters in bfloat16, in training mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(use_cache=False)).train()
    finally:
        torch.set_default_dtype(before)


def no_data() -> None:
    """Nothing is trained."""
    raise NotImplementedError("this job is sized, not trained")
