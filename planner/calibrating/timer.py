"""Seconds of one operation, run alone as it runs within a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

# Where the arguments of an operation were made: by the operation before; in the step before; by the forward that
# this backward belongs to, which has moved the whole step's activations since.
Distance = Literal["near", "cold", "far"]
# An operation that moves less finds what is near in the cache.
_CACHED_BYTES = 1 << 19
# Touched between two runs of an operation that does not.
_EVICTING_BYTES = 16 << 20
# What is far is read from copies in turn, of so many bytes in all: what one cache evicts, the next one keeps.
_FAR_BYTES, _MAX_COPIES = 48 << 20, 12
_MIN_RUNS, _MAX_RUNS, _ENOUGH_S = 3, 30, 0.02
# Of the results of the runs that are kept.
_KEPT_BYTES = 1 << 30


class Timer:
    """Times operations on one device.

    As in a step, what a run makes is in memory that it has not just used (the results of all runs are kept until
    the last one), and what was made too long before to be in a cache is not in one now. On the CPU the time is that
    of the processor where one thread computes, which other programs do not add to, else that of the clock; on CUDA
    that between two events.

    Args:
        device: that computes.
        threads: that one operation uses on the CPU.
    """

    def __init__(self, device: torch.device, *, threads: int) -> None:
        self.device = device
        self._clock_ns = time.thread_time_ns if threads == 1 else time.perf_counter_ns
        self._other = torch.zeros(_EVICTING_BYTES // 4, device=device)

    def median_s(
        self, ready: Callable[[], Callable[[], Any]], *, moved_bytes: int, distance: Distance = "near"
    ) -> float:
        """Median seconds of some runs, after one that is not counted.

        Args:
            ready: gives the operation with arguments, others at each call.
            moved_bytes: that it reads and writes.
            distance: where what it reads was made.
        """
        num_copies = min(_MAX_COPIES, 1 + _FAR_BYTES // max(1, moved_bytes)) if distance == "far" else 1
        runs = [ready() for _ in range(num_copies)]
        kept = [runs[-1]()]
        times_s: list[float] = []
        spent_s = 0.0
        while len(times_s) < _MIN_RUNS or (spent_s < _ENOUGH_S and len(times_s) < _MAX_RUNS):
            if distance != "near" or moved_bytes > _CACHED_BYTES:
                self._other.add_(1.0)
            if len(kept) * moved_bytes > _KEPT_BYTES:
                kept.clear()
            times_s.append(self._once_s(runs[len(times_s) % num_copies], kept))
            spent_s += times_s[-1]
        return statistics.median(times_s)

    def _once_s(self, run: Callable[[], Any], kept: list[Any]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kept.append(run())
            end.record()
            torch.cuda.synchronize(self.device)
            return max(start.elapsed_time(end) / 1e3, 1e-9)
        begin = self._clock_ns()
        kept.append(run())
        return max((self._clock_ns() - begin) / 1e9, 1e-9)
