"""Loops: how an operation can share a kernel with others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """How an operation can share a kernel."""

    ALONE = "alone"  # a kernel of its own: products, convolutions, attention, random and unknown operations
    POINTWISE = "pointwise"  # one element from the elements at its place
    REDUCTION = "reduction"  # sums up some dimensions


class Reduced(Enum):
    """Which dimensions a reduction sums up."""

    NONE = "none"
    INNER = "inner"  # the last ones: what comes after can run in the same pass over a row
    OUTER = "outer"  # others, or all: its result is there when the whole kernel has ended


@dataclass(frozen=True)
class Loop:
    """The loop of one operation.

    Attributes:
        role: how it can share a kernel.
        num_read: elements that it runs over.
        num_made: elements of its result; those of the loop but for a reduction.
        reduced: dimensions that it sums up.
    """

    role: Role
    num_read: int = 0
    num_made: int = 0
    reduced: Reduced = Reduced.NONE


ALONE = Loop(Role.ALONE)


def joint_loop(a: Loop, b: Loop) -> Loop | None:
    """The loop of a kernel with both, None where they do not fit.

    >>> row = Loop(Role.REDUCTION, 12, 3, Reduced.INNER)
    >>> joint_loop(row, Loop(Role.POINTWISE, 12, 12)) == row
    True
    >>> joint_loop(row, Loop(Role.REDUCTION, 12, 4, Reduced.OUTER)) is None
    True
    """
    if a.reduced is not Reduced.NONE and b.reduced is not Reduced.NONE:
        return a if (a.num_read, a.num_made, a.reduced) == (b.num_read, b.num_made, b.reduced) else None
    if b.reduced is not Reduced.NONE:
        a, b = b, a
    if a.reduced is Reduced.NONE:
        return a if a.num_read == b.num_read else None
    return a if b.num_read in (a.num_read, a.num_made) else None
