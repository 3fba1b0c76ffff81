"""Fully sharded parameters (DTensor) step like whole ones; two gloo ranks."""

import copy
import json
import os
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS

MAKERS = {
    "lars": lambda params: LARS(params, lr=0.1, weight_decay=0.1, trust_coefficient=0.5),
    "lamb": lambda params: LAMB(params, lr=0.02, weight_decay=0.1),
    "ranger": lambda params: Ranger(params, lr=0.02, weight_decay=0.1, gradient_centralization=True),
    "ranger_lars": lambda params: RangerLARS(params, lr=0.02, weight_decay=0.1),
    "ranger_lars_before_rectify": lambda params: RangerLARS(params, lr=0.02, trust="before_rectify"),
    "lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.02)),
}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def write_largest_differences_to_unsharded(rank, port, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        differences = {}
        for name, make in MAKERS.items():
            torch.manual_seed(0)
            whole = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))
            sharded: Any = fully_shard(copy.deepcopy(whole), mesh=dist.init_device_mesh("cpu", (2,)))
            assert all(isinstance(p, DTensor) for p in sharded.parameters())
            optimizers = [make(whole.parameters()), make(sharded.parameters())]
            for _ in range(8):
                for model, optimizer in zip((whole, sharded), optimizers):
                    optimizer.zero_grad()
                    (model(torch.linspace(-1, 1, 6).reshape(2, 3)) - 1).square().mean().backward()
                    optimizer.step()
            differences[name] = max(
                (p.full_tensor() - q).abs().max().item()
                for p, q in zip(sharded.parameters(), whole.parameters())
            )
        (folder / f"{rank}.json").write_text(json.dumps(differences))
    finally:
        dist.destroy_process_group()
    # The answer is written. Torch's background threads sometimes abort the interpreter's own end.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_sharded_steps_agree_with_whole_ones(tmp_path):
    context: Any = mp.spawn(
        write_largest_differences_to_unsharded, args=(free_port(), tmp_path), nprocs=2, join=False
    )
    deadline = time.monotonic() + 60
    while not context.join(timeout=1):  # raises what a rank raised
        assert time.monotonic() < deadline, "the ranks hang"
    for rank in range(2):
        differences = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(differences) == set(MAKERS)
        # float32 weights of about 1; a sharded norm adds in another order.
        assert max(differences.values()) < 2e-6, differences
