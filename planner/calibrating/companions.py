"""Further processes that do what the measuring one does at the same time, as the ranks of a machine do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from cost_models.measurements import Transfer
from planner.calibrating.operations import RunsAlone
from planner.calibrating.overhead import OVERHEAD, Overhead
from planner.calibrating.sharing import block_overheads_s

_SHARING, _END = "sharing", "end"
_SIZES_BYTES = tuple(1 << power for power in range(10, 27, 2))
_REDUCTIONS = 7
_JOIN_S = 10.0
_ALONE = "a process that measures beside this one has ended. What was measured is kept; run the same command again."

Sharing = tuple[tuple[Transfer, ...], Mapping[str, float]]
MakeOperations = Callable[[], Mapping[str, RunsAlone]]


@contextmanager
def companions(
    make: MakeOperations, *, processes: int, threads: int
) -> Iterator[tuple[Callable[[str], None], Callable[[], Sharing]]]:
    """Processes that run each operation while this one measures it.

    Args:
        make: gives all operations that may be measured; picklable, it runs in each process.
        processes: in all, this one included.
        threads: of each.

    Returns:
        What is called before each visit, and what measures all-reduces over all processes and the overheads of
        blocks that they share (none for one).
    """
    if processes == 1:
        yield (lambda line: None), lambda: ((), {})
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="lowtide-") as folder:
        address = f"file://{folder}/rendezvous"
        pipes = [context.Pipe() for _ in range(1, processes)]
        others = [
            context.Process(
                target=_companion, args=(make, address, rank, processes, threads, theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes, start=1)
        ]
        ours = [pipe for pipe, _ in pipes]

        def say(line: str) -> None:
            try:
                for pipe in ours:
                    pipe.send(line)
                for pipe in ours:
                    pipe.recv()  # it runs
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise ValueError(_ALONE) from error

        def share() -> Sharing:
            say(_SHARING)
            try:
                return _measured_reductions(), block_overheads_s()
            except RuntimeError as error:
                if all(process.is_alive() for process in others):
                    raise
                raise ValueError(_ALONE) from error

        try:
            for process, (_, theirs) in zip(others, pipes, strict=True):
                process.start()
                theirs.close()  # so that the end of the process is seen
            dist.init_process_group("gloo", init_method=address, rank=0, world_size=processes)
            yield say, share
            say(_END)
            for process in others:
                process.join(_JOIN_S)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for process in others:
                if process.exitcode is None and process.pid is not None:
                    process.kill()
                    process.join()


def _measured_reductions() -> tuple[Transfer, ...]:
    found = []
    for size_bytes in _SIZES_BYTES:
        buffer = torch.zeros(size_bytes // 4)
        times_s = []
        for _ in range(_REDUCTIONS):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(buffer)
            times_s.append(time.perf_counter() - begin)
        found.append(Transfer(size_bytes=size_bytes, time_s=statistics.median(times_s)))
    return tuple(found)


def _companion(
    make: MakeOperations, address: str, rank: int, processes: int, threads: int, pipe: Connection
) -> None:
    """The life of one of the other processes: it runs what it was told last until it is told something else."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    overhead = Overhead(device)
    known: dict[str, RunsAlone] = {**make(), **overhead.operations}
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    while True:
        try:
            line = pipe.recv()
        except EOFError:  # the measuring process is gone
            os._exit(1)
        if line in (_END, _SHARING):
            pipe.send(line)
            if line == _END:
                break
            _measured_reductions()
            block_overheads_s()
            continue
        try:
            run = overhead.steps_s if line == OVERHEAD else known[line].ready(device)
            run()
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            pipe.send(line)  # the measuring process says that it does not run alone
            continue
        pipe.send(line)
        with contextlib.nullcontext() if line == OVERHEAD else torch.no_grad():
            while not pipe.poll():
                run()
    dist.destroy_process_group()
    os._exit(0)
