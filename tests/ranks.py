"""Functions run on the ranks of a group on this machine."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

_LIMIT_S = 300


def on_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """What ``function(rank, *args)`` returns on each rank, in a gloo group of new processes with a thread each.

    Raises:
        RuntimeError: it failed on a rank; carries the traceback.
    """
    context = mp.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    ranks = [
        context.Process(target=_run, args=(rank, world_size, port, answers, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        found: dict[int, Any] = {}
        while len(found) < world_size:
            rank, failed, answer = answers.get(timeout=_LIMIT_S)
            if failed:
                raise RuntimeError(f"rank {rank}: {answer}")
            found[rank] = answer
        return [found[rank] for rank in range(world_size)]
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _run(rank: int, world_size: int, port: int, answers: Any, function: Any, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    # torch's own, of its own deprecated parts and of what it could not free.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*Profiler clears events.*")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        answers.put((rank, False, function(rank, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        answers.put((rank, True, traceback.format_exc()))
    finally:
        answers.close()
        answers.join_thread()
        os._exit(0)  # torch's own teardown aborts now and then
