"""Measured peak bytes of a training step: what PyTorch's allocator has given out, on CPU and CUDA."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.profiler import profile

from planner.capturing.optimizer_step import unique_bytes
from planner.lower.trace import pytree


@dataclass
class Measurement:
    """Filled when the measured block ends.

    Attributes:
        live_bytes: there when the block began.
        peak_bytes: most bytes at any time of the block, those included.
        left_bytes: there when the block ended.
    """

    live_bytes: int = 0
    peak_bytes: int = 0
    left_bytes: int = 0


class PeakMeter:
    """Measures the peak of one rank's memory during a block of code.

    The definition is the plan's: bytes of the storages that PyTorch's allocator has given out and not got back.
    On CUDA that is ``max_memory_allocated``. On the CPU the allocator keeps no total: every allocation and
    release inside the block is read from its profiler events and added to the bytes that were there before,
    which the caller names. Memory that libraries allocate behind PyTorch's back is not seen on either.

    Set the environment variable ``KINETO_LOG_LEVEL=99`` before torch is imported to keep the profiler quiet.

    Args:
        device: of the step.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    @contextmanager
    def step(self, *, live: Iterable[torch.Tensor] = (), extra_bytes: int = 0) -> Iterator[Measurement]:
        """Measure the block.

        Args:
            live: every tensor of the rank that exists before the block; storages count once. Not read on CUDA.
            extra_bytes: storages that no tensor shows, such as gradient buckets. Not read on CUDA.

        Returns:
            A measurement that holds its numbers when the block has ended.
        """
        measurement = Measurement()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            measurement.live_bytes = torch.cuda.memory_allocated(self.device)
            yield measurement
            torch.cuda.synchronize(self.device)
            measurement.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            measurement.left_bytes = torch.cuda.memory_allocated(self.device)
            return
        measurement.live_bytes = unique_bytes(live) + extra_bytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Profiler clears events.*")
            # Not torch.profiler's, around this one: it keeps 50 kB of every use until the process ends.
            events = profile(profile_memory=True)
            with events:
                yield measurement
        sums = list(itertools.accumulate(_allocations(events), initial=measurement.live_bytes))
        measurement.peak_bytes, measurement.left_bytes = max(sums), sums[-1]


def live_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: object = ()
) -> list[torch.Tensor]:
    """Parameters, gradients, buffers, optimizer state and batch: what a rank holds between steps.

    Args:
        model: of the rank.
        optimizer: its optimizer, if there is one.
        batch: inputs and targets of the step.

    Returns:
        Tensors; several may share a storage. Of a sharded one, this rank's part.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state = pytree.tree_leaves(list(optimizer.state.values()) if optimizer is not None else [])
    leaves = itertools.chain(model.parameters(), model.buffers(), gradients, state, pytree.tree_leaves(batch))
    # A sharded tensor has its part in an attribute; to name its class would load torch.distributed.tensor.
    return [getattr(leaf, "_local_tensor", leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _allocations(events: profile) -> Iterator[int]:
    """Bytes of every allocation (positive) and release (negative), in order."""
    results = events.kineto_results
    assert results is not None
    for event in results.events():
        if event.name() == "[memory]":
            yield event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, operations on the CPU run on so many threads: some kernels allocate for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
