"""Blocks that execute plans of their own, gathered one by one by FSDP2: gradients of eager, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from orchestrator import sharding
from orchestrator.worker import Assignment, with_block_plans
from planner.block_plan import plan_block
from planner.blocks import block_names
from planner.errors import PlanMismatchError
from planner.measure import PeakMeter, live_tensors
from planner.step import named_inputs
from tests.models import TinyGPT, token_loss
from tests.ranks import on_ranks

BATCH, LENGTH, WIDTH = 8, 64, 32


def model() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(width=WIDTH, layers=3, dropout=0.1)


@pytest.fixture(scope="module")
def plans() -> dict[str, str]:
    """A plan for each block; alike blocks share one."""
    whole = model().train()
    names = block_names(whole)
    inputs = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    plan = plan_block(whole.get_submodule(names[0]), inputs, budget="70% of activations")
    assert plan.num_rematerialized > 0
    return dict.fromkeys(names, plan.to_json())


def run(kind: str, rank: int, plans: dict[str, str]) -> tuple[list[torch.Tensor], list[str], int]:
    """Gradients of the last of three steps, names of the state, and the peak bytes of a step."""
    module = with_block_plans(model(), plans)
    if kind == "ddp":
        step = sharding.data_parallel(module)
    else:
        blocks = block_names(model())
        step = sharding.shard(
            module, blocks=blocks, reshard_after_forward=kind == "fsdp", device=torch.device("cpu")
        )
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 64, (BATCH, LENGTH), generator=generator)
    peaks = []
    for number in range(3):
        step.zero_grad()
        torch.manual_seed(10 * rank + number)
        with PeakMeter("cpu").step(live=live_tensors(module, batch=tokens)) as measured:
            token_loss(step(tokens), tokens).backward()
        if number:
            peaks.append(measured.peak_bytes)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return whole, list(module.state_dict()), min(peaks)


def compare(rank: int, plans: dict[str, str]) -> dict[str, tuple[bool, bool, int, int]]:
    found = {}
    for kind in ("ddp", "fsdp", "fsdp_keep"):
        eager, names, eager_peak = run(kind, rank, {})
        planned, planned_names, planned_peak = run(kind, rank, plans)
        same = len(eager) == len(planned) and all(map(torch.equal, eager, planned))
        found[kind] = same, names == planned_names, eager_peak, planned_peak
    return found


@pytest.mark.slow
def test_planned_blocks_have_the_gradients_of_eager_and_need_less_memory(plans: dict[str, str]):
    found = on_ranks(compare, plans)
    for rank in found:
        for kind, (same_gradients, same_names, eager_peak, planned_peak) in rank.items():
            assert same_gradients, kind
            assert same_names, kind
            assert planned_peak < eager_peak, kind


def test_a_plan_for_a_block_that_is_not_there_is_refused(plans: dict[str, str]):
    with pytest.raises(PlanMismatchError, match=r"the block 'blocks.9'"):
        with_block_plans(model(), {"blocks.9": plans["blocks.0"]})


def test_a_step_has_one_plan_or_many():
    with pytest.raises(ValueError, match="not both"):
        Assignment({}, ".", ".", "{}", {"blocks.0": "{}"})


def test_the_mode_of_a_planned_block_is_that_of_its_model(plans: dict[str, str]):
    module = with_block_plans(model(), plans).train()
    modes = {part: part.training for part in module.modules()}
    module.eval()
    block: Any = module.get_submodule("blocks.0")
    assert not block._original.training
    for part, training in modes.items():
        part.training = training
    assert block._original.training


def test_a_planned_block_alone_has_the_gradients_of_eager(plans: dict[str, str]):
    eager: nn.Module = model().train()
    planned = with_block_plans(copy.deepcopy(eager), plans)
    tokens = torch.randint(0, 64, (BATCH, LENGTH))
    for module in (eager, planned):
        torch.manual_seed(1)
        token_loss(module(tokens), tokens).backward()
    for ours, theirs in zip(planned.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_blocks_called_by_position_and_name_are_planned_by_name(kind: str):
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    common = dict(vocab_size=64, use_cache=False, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, **common)
        eager = transformers.GPT2LMHeadModel(config).train()
    else:
        sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
        eager = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **common)).train()
    names, tokens = block_names(eager), torch.randint(0, 64, (2, 32))
    calls: list[Any] = []
    block = eager.get_submodule(names[1])
    with block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True):
        eager(input_ids=tokens)
    assert calls[0][1]
    assert calls[0][2]
    plan = plan_block(block, named_inputs(*calls[0]), budget="80% of activations")
    planned = with_block_plans(copy.deepcopy(eager), dict.fromkeys(names, plan.to_json()))
    for module in (eager, planned):
        torch.manual_seed(1)
        token_loss(module(input_ids=tokens).logits, tokens).backward()
    assert list(planned.state_dict()) == list(eager.state_dict())
    for ours, theirs in zip(planned.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_inputs_by_position_get_the_names_of_the_forward():
    class Two(nn.Module):
        def forward(self, x: Any, y: Any, *, z: Any) -> None: ...

    assert named_inputs(Two(), (1, 2), {"z": 3}) == {"x": 1, "y": 2, "z": 3}
    with pytest.raises(PlanMismatchError, match="only 2 of its inputs by position have names"):
        named_inputs(Two(), (1, 2, 3), {"z": 4})
