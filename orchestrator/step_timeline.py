"""One micro-batch on one rank as two queues: the device computes, messages travel; what of them nothing hides."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cost_models.cluster import ClusterSpec
from cost_models.cluster_collectives import cluster_collective_s
from cost_models.work import Collective, CollectiveKind
from planner.capturing.rank_memory import Sharding

# DDP sums gradients in buckets of this size.
_BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class BlockTimes:
    """What one micro-batch takes and how large its units are.

    Attributes:
        rest_s: seconds of each stretch between blocks, 2 L + 1 of them, as for `planner.blockwise.profile.Rest`.
        forward_s: of each block, in the order in which they run.
        backward_s: of each block, in the same order.
        block_bytes: parameters of each block.
        root_bytes: parameters of what lies in no block.
    """

    rest_s: tuple[float, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    block_bytes: tuple[int, ...]
    root_bytes: int


@dataclass(frozen=True)
class Timeline:
    """What one micro-batch took.

    Attributes:
        compute_s: seconds of computation.
        end_s: when computation and messages were done.
        communication_s: seconds of messages, hidden or not.
    """

    compute_s: float
    end_s: float
    communication_s: float

    @property
    def exposed_s(self) -> float:
        """Seconds of messages that no computation hid."""
        return max(0.0, self.end_s - self.compute_s)


@dataclass(frozen=True)
class Communication:
    """Seconds of messages among the first ranks of a cluster.

    Attributes:
        cluster: that they travel on.
        workers: ranks.
    """

    cluster: ClusterSpec
    workers: int

    def seconds(self, kind: CollectiveKind, size_bytes: int) -> float:
        """One collective over all ranks; 0.0 for one rank or no bytes."""
        return _seconds(self.cluster, self.workers, kind, size_bytes) if size_bytes else 0.0

    def all_reduce_s(self, size_bytes: int) -> float:
        """Gradients of this size in DDP's buckets."""
        whole, left = divmod(size_bytes, _BUCKET_BYTES)
        return whole * self.seconds("all_reduce", _BUCKET_BYTES) + self.seconds("all_reduce", left)


@functools.lru_cache(maxsize=4096)
def _seconds(cluster: ClusterSpec, workers: int, kind: CollectiveKind, size_bytes: int) -> float:
    return cluster_collective_s(Collective(kind, size_bytes, workers), cluster)


def timeline(times: BlockTimes, messages: Communication, sharding: Sharding, *, is_last: bool) -> Timeline:
    """Run one micro-batch on paper.

    Messages travel one after the other. A block waits for its parameters, which are fetched while the block before
    it computes; the reduction of its gradients begins when its backward ends.

    Args:
        times: of its stretches and blocks.
        messages: among the ranks.
        sharding: what is gathered and reduced, and when.
        is_last: of the step's micro-batches: only after it gradients are reduced.
    """
    count = len(times.forward_s)
    is_sharded = sharding != "ddp"
    now = sent = total = 0.0

    def send(ready_s: float, seconds: float) -> float:
        nonlocal sent, total
        sent = max(sent, ready_s) + seconds
        total += seconds
        return sent

    gather = [messages.seconds("all_gather", size) if is_sharded else 0.0 for size in times.block_bytes]
    if is_sharded:
        now = send(0.0, messages.seconds("all_gather", times.root_bytes))
    there = [0.0] * count
    began = now
    for at in range(count):
        now += times.rest_s[at]
        there[at] = send(began, gather[at])
        now = max(now, there[at])
        began = now
        now += times.forward_s[at]
    now += times.rest_s[count]
    for step, at in enumerate(reversed(range(count))):
        if sharding == "fsdp":
            now = max(now, send(began, gather[at]))
        began = now
        now += times.backward_s[at]
        if is_last:
            if is_sharded:
                send(now, messages.seconds("reduce_scatter", times.block_bytes[at]))
            else:
                send(now, messages.all_reduce_s(times.block_bytes[at]))
        now += times.rest_s[count + 1 + step]
    if is_last:
        root_s = (
            messages.seconds("reduce_scatter", times.root_bytes)
            if is_sharded
            else messages.all_reduce_s(times.root_bytes)
        )
        send(now, root_s)
    compute_s = sum(times.rest_s) + sum(times.forward_s) + sum(times.backward_s)
    return Timeline(compute_s, max(now, sent), total)
