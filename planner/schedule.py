"""What an executor does, in order: compute a node, free a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a node: its inputs are there, its outputs appear."""

    node: int


@dataclass(frozen=True, slots=True)
class Free:
    """Drop a value; it is gone until its node runs again."""

    value: int


Instruction = Compute | Free


@dataclass(frozen=True)
class Schedule:
    """One training step, instruction by instruction.

    Attributes:
        instructions: in execution order.
    """

    instructions: tuple[Instruction, ...]

    @property
    def node_order(self) -> tuple[int, ...]:
        """Indices of the nodes in the order in which they run; a rematerialized node is there twice."""
        return tuple(i.node for i in self.instructions if isinstance(i, Compute))
