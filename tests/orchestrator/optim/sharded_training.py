"""Ranks on gloo for the tests of sharding: models with uneven shards, and what each rank writes."""

import json
import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS

MAKERS = {
    "lars": lambda params, **o: LARS(params, lr=0.1, weight_decay=0.1, trust_coefficient=0.5, **o),
    "lamb": lambda params, **o: LAMB(params, lr=0.02, weight_decay=0.1, **o),
    "ranger": lambda params, **o: Ranger(
        params, lr=0.02, weight_decay=0.1, gradient_centralization=True, **o
    ),
    "ranger_lars": lambda params, **o: RangerLARS(params, lr=0.02, weight_decay=0.1, **o),
    "ranger_lars_before_rectify": lambda params, **o: RangerLARS(
        params, lr=0.02, trust="before_rectify", **o
    ),
    "lookahead": lambda params, implementation="foreach": Lookahead(
        torch.optim.AdamW(params, lr=0.02), implementation=implementation
    ),
}


def model_of_uneven_shards(dtype=torch.float32):
    """Rows of 5, 7 and 3 on 2 or 4 ranks: some ranks hold a row less, or none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 3)).to(
        dtype
    )


def train_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 3, generator=generator, dtype=dtype)
    optimizer.zero_grad()
    (model(x) - x.cumsum(1)).square().mean().backward()
    optimizer.step()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _one_rank(rank, world_size, port, folder, work, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        answer = work(folder, **arguments)
        (folder / f"answer-{rank}.json").write_text(json.dumps(answer))
    finally:
        dist.destroy_process_group()
    # The answer is written. Torch's background threads sometimes abort the interpreter's own end.
    os._exit(0)


def on_ranks(world_size, folder, work, **arguments):
    """What `work(folder, **arguments)` returned on each of `world_size` ranks."""
    context: Any = mp.spawn(
        _one_rank,
        args=(world_size, free_port(), folder, work, arguments),
        nprocs=world_size,
        join=False,
    )
    deadline = time.monotonic() + 90
    while not context.join(timeout=1):  # raises what a rank raised
        assert time.monotonic() < deadline, "the ranks hang"
    return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(world_size)]
