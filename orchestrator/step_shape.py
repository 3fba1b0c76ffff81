"""How one optimizer step may be divided over ranks, and a division with its price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cost_models.cluster import ClusterSpec
from planner.capturing.rank_memory import Sharding
from planner.problem import Objective

SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp", "fsdp_keep")


@dataclass(frozen=True)
class Shape:
    """How one optimizer step is divided.

    Attributes:
        workers: ranks.
        sharding: how they share the model.
        micro_batch: samples of one forward of one rank.
        accumulation: forwards of one rank in one step.
    """

    workers: int
    sharding: Sharding
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.workers * self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Sized:
    """A shape with its plan and its price.

    Attributes:
        shape: how the step is divided.
        peak_bytes: predicted of one rank; where it does not fit, the least that any plan found for it needs.
        step_s: seconds of one optimizer step; 0.0 where it does not fit.
        compute_s: of forward and backward with everything retained.
        remat_s: that rematerialization adds.
        exposed_s: of communication that no computation hides.
        optimizer_s: of the optimizer.
        energy_j: of the devices of all ranks.
        is_blockwise: planned block by block.
        refused: why it cannot be run, "" where it can.
    """

    shape: Shape
    peak_bytes: int
    step_s: float = 0.0
    compute_s: float = 0.0
    remat_s: float = 0.0
    exposed_s: float = 0.0
    optimizer_s: float = 0.0
    energy_j: float = 0.0
    is_blockwise: bool = False
    refused: str = ""

    @property
    def samples_per_s(self) -> float:
        """Samples a second over all ranks; 0.0 where it does not fit."""
        return self.shape.global_batch / self.step_s if self.step_s else 0.0

    def score(self, objective: Objective) -> float:
        """Seconds or joules of a sample, the less the better."""
        if self.refused:
            return float("inf")
        return (self.energy_j if objective == "energy" else self.step_s) / self.shape.global_batch


def shapes_of(global_batch: int, cluster: ClusterSpec) -> Iterator[Shape]:
    """Every way to divide a step: workers by powers of two and whole nodes, micro-batches by divisors.

    Args:
        global_batch: samples of one optimizer step.
        cluster: that it runs on.
    """
    counts = {1 << power for power in range(cluster.world_size.bit_length())}
    counts |= {nodes * cluster.devices_per_node for nodes in range(1, cluster.num_nodes + 1)}
    for workers in sorted(count for count in counts if count <= cluster.world_size):
        if global_batch % workers:
            continue
        share = global_batch // workers
        for micro_batch in (size for size in range(1, share + 1) if share % size == 0):
            for sharding in SHARDINGS if workers > 1 else SHARDINGS[:1]:
                yield Shape(workers, sharding, micro_batch, share // micro_batch)
