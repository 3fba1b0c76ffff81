"""What a block costs beyond its computation and messages when ranks share a model: hooks, small copies."""

from __future__ import annotations

import copy
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

_UNITS = 8
_STEPS = 9


def block_overheads_s() -> dict[str, float]:
    """Seconds that each gathered block adds to a forward and backward; all ranks call it together.

    The blocks are so small that neither arithmetic nor messages matter.

    Returns:
        "fsdp" and "fsdp_keep" -> seconds a block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(_UNITS)))
    alone_s = _median_s(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, reshard in (("fsdp", True), ("fsdp_keep", False)):
        shared = copy.deepcopy(plain)
        for block in shared:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(shared, mesh=mesh, reshard_after_forward=False)
        found[name] = max(0.0, _median_s(shared) - alone_s) / _UNITS
    return found


def _median_s(model: nn.Module) -> float:
    inputs = torch.randn(4, 16)
    times_s = []
    for _ in range(_STEPS):
        dist.barrier()
        begin = time.perf_counter()
        model(inputs).sum().backward()
        times_s.append(time.perf_counter() - begin)
    return statistics.median(times_s)
