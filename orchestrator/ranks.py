"""The ranks of one run, and the few things that they tell one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """One rank's view of the group it belongs to.

    With more than one rank, the backend that started them has made torch's default process group.

    Attributes:
        rank: this process, 0 <= rank < world_size.
        world_size: how many there are.
        device: what this rank computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and reports."""
        return self.rank == 0

    def gather(self, row: list[float]) -> list[list[float]]:
        """Every rank's row of the same length, in the order of the ranks; all ranks get the same answer."""
        if self.world_size == 1:
            return [row]
        mine = torch.tensor(row, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine)
        return [other.tolist() for other in rows]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's object, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
