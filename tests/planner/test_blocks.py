"""Repeated blocks are found in models of all kinds, and together with the root they hold every parameter once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from planner.blocks import block_names, units
from tests.models import BatchNormNet, TinyGPT


def check_units(model: nn.Module) -> None:
    """Every parameter lies in exactly one unit."""
    found = [id(p) for unit in units(model, block_names(model)) for p in unit.parameters]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


def test_the_blocks_of_a_list_are_found_and_the_root_has_the_rest():
    model = TinyGPT(layers=3)
    assert block_names(model) == ("blocks.0", "blocks.1", "blocks.2")
    root = units(model, block_names(model))[0]
    expected = [model.embedding.weight, model.norm.weight, model.norm.bias, model.head.weight]
    assert [id(p) for p in root.parameters] == [id(p) for p in expected]
    check_units(model)


def test_a_tied_weight_lies_in_the_root_alone():
    model = TinyGPT(tied=True)
    root = units(model, block_names(model))[0]
    assert sum(p is model.embedding.weight for p in root.parameters) == 1
    check_units(model)


def test_a_block_that_shares_a_parameter_stays_in_the_root():
    model = TinyGPT(layers=3)
    model.blocks[0].up.weight = model.blocks[1].up.weight  # type: ignore[union-attr]
    assert block_names(model) == ("blocks.2",)
    check_units(model)


def test_single_layers_are_no_blocks():
    assert block_names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())) == ()
    assert block_names(nn.Linear(4, 4)) == ()


def test_a_sequential_of_sequentials_repeats():
    def part() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.GELU())

    model = nn.Sequential(nn.Linear(2, 4), part(), part(), nn.Linear(4, 2))
    assert block_names(model) == ("1", "2")
    check_units(model)
    assert block_names(BatchNormNet()) == tuple(f"body.{index}" for index in range(4))


def test_a_block_inside_a_block_belongs_to_the_outer_one():
    class Outer(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            inner = [Outer(depth - 1), Outer(depth - 1)] if depth else [nn.Linear(3, 3)]
            self.inner = nn.ModuleList(inner)

    assert block_names(Outer(2)) == ("inner.0", "inner.1")
    check_units(Outer(2))


def test_transformers_are_taken_apart_by_their_layers():
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
    )
    assert block_names(gpt2) == ("transformer.h.0", "transformer.h.1", "transformer.h.2")
    check_units(gpt2)
    sizes: dict[str, int] = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes))
    assert block_names(llama) == ("model.layers.0", "model.layers.1")
    check_units(llama)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=16)
    )
    names = [f"{stack}.block.{index}" for stack in ("encoder", "decoder") for index in range(2)]
    assert block_names(t5) == tuple(names)
    check_units(t5)


def test_a_vision_transformer_and_a_residual_network_too():
    models: Any = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    with torch.device("meta"):
        vit, resnet = models.vit_b_16(), models.resnet18()
    assert block_names(vit) == tuple(f"encoder.layers.encoder_layer_{index}" for index in range(12))
    check_units(vit)
    assert block_names(resnet) == tuple(
        f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)
    )
    check_units(resnet)
