"""Planned modules under DDP and FSDP2 on two ranks: the gradients of eager under the same wrapper."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import planner
from tests.models import Block, TinyGPT, token_loss

WORLD = 2


def data_parallel(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def sharded(module: nn.Module) -> nn.Module:
    return fully_shard(module)


def sharded_by_block(module: nn.Module) -> nn.Module:
    for block in module.get_submodule("blocks").children():
        fully_shard(block)
    return fully_shard(module)


def whole_plan(model: nn.Module, batch: Any) -> nn.Module:
    plan = planner.plan(model, batch, loss=token_loss, budget="60% of activations", world_size=WORLD)
    assert plan.num_rematerialized > 0
    return planner.apply(model, plan)


def plan_of_each_block(model: nn.Module, batch: Any) -> nn.Module:
    assert isinstance(model, TinyGPT)
    x = torch.randn(4, 48, 32, requires_grad=True)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        plan = planner.plan(block, (x, torch.randn(4, 48, 32)), loss=F.mse_loss, budget="90% of activations")
        model.blocks[index] = planner.apply(block, plan)
    return model


CASES: dict[str, tuple[Callable[[nn.Module, Any], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "DDP around": (whole_plan, data_parallel),
    "FSDP2 around": (whole_plan, sharded),
    "FSDP2 with planned blocks inside": (plan_of_each_block, sharded_by_block),
}


def gradients(module: nn.Module, batch: Any, rank: int) -> list[torch.Tensor]:
    """Of the second of two steps, whole."""
    for step in range(2):
        module.zero_grad()
        torch.manual_seed(10 * rank + step)
        token_loss(module(batch[0]), batch[1]).backward()
    found = [p.grad for p in module.parameters()]
    return [g.full_tensor() if isinstance(g, dist.tensor.DTensor) else g for g in found if g is not None]


def run_rank(rank: int, port: int, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    generator = torch.Generator().manual_seed(rank)
    batch = tuple(torch.randint(0, 64, (4, 48), generator=generator) for _ in range(2))
    for name, (planned, wrapped) in CASES.items():
        torch.manual_seed(0)
        model = TinyGPT(dropout=0.1)
        eager = gradients(wrapped(copy.deepcopy(model)), batch, rank)
        ours = gradients(wrapped(planned(copy.deepcopy(model), batch)), batch, rank)
        same = len(eager) == len(ours) and all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
        answers.put((name, rank, same))
    dist.barrier()
    dist.destroy_process_group()
    answers.close()
    answers.join_thread()
    os._exit(0)  # torch's own teardown aborts now and then


@pytest.mark.slow
def test_two_ranks_get_the_gradients_of_eager_with_a_plan_inside_their_wrapper():
    context = mp.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, port, answers)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    received = (answers.get(timeout=240) for _ in range(WORLD * len(CASES)))
    found = {(name, rank): same for name, rank, same in received}
    for process in ranks:
        process.join(timeout=60)
    assert found == {(name, rank): True for name in CASES for rank in range(WORLD)}


def test_a_model_that_is_sharded_already_is_refused_with_what_to_do():
    class ShardedGPT(FSDPModule, TinyGPT):  # the class that fully_shard gives a module
        def __new__(cls) -> ShardedGPT:
            return nn.Module.__new__(cls)

    model = ShardedGPT()
    batch = (torch.randint(0, 64, (2, 8)), torch.randint(0, 64, (2, 8)))
    with pytest.raises(planner.CaptureError, match=r"sharded already.*fully_shard on the planned module"):
        planner.plan(model, batch, loss=token_loss, budget="none")
