"""When a forward value can be needed in backward, and memory as a function of what is retained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.graph import Graph


@dataclass(frozen=True)
class Windows:
    """Facts about a graph that the materialization formulation is written in.

    Times are indices of nodes; backward times are those from `graph.num_forward` on. A *trigger* of a forward
    node is a backward time at which its rematerialization may first be asked for: the first direct use of one
    of its outputs, or a trigger of a node that reads them.

    Attributes:
        graph: the training step.
    """

    graph: Graph

    @cached_property
    def direct(self) -> tuple[tuple[int, ...], ...]:
        """For each value the backward times that read it."""
        cut = self.graph.num_forward
        return tuple(tuple(t for t in users if t >= cut) for users in self.graph.users)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each value the forward nodes that read it and may be rematerialized."""
        cut, nodes = self.graph.num_forward, self.graph.nodes
        return tuple(
            tuple(t for t in users if t < cut and nodes[t].can_rematerialize and self.triggers[t])
            for users in self.graph.users
        )

    @cached_property
    def droppable(self) -> tuple[int, ...]:
        """Forward values that a schedule may drop after forward and make again."""
        graph = self.graph
        return tuple(
            index
            for index, value in enumerate(graph.values)
            if value.node < graph.num_forward
            and not value.is_held
            and not value.first_run_only
            and value.size_bytes > 0
            and graph.nodes[value.node].can_rematerialize
            and self.end[index] >= 0
        )

    @cached_property
    def triggers(self) -> tuple[tuple[int, ...], ...]:
        """For each forward node its triggers in order; none for nodes that are never run again."""
        graph, cut = self.graph, self.graph.num_forward
        masks = [0] * cut
        for k in range(cut - 1, -1, -1):
            node = graph.nodes[k]
            if not node.can_rematerialize:
                continue
            for v in node.outputs:
                value = graph.values[v]
                if value.is_held or value.first_run_only or value.size_bytes == 0:
                    continue
                if self.direct[v]:
                    masks[k] |= 1 << (self.direct[v][0] - cut)
                for user in graph.users[v]:
                    if user < cut:
                        masks[k] |= masks[user]
        return tuple(_bits(mask, offset=cut) for mask in masks)

    @cached_property
    def end(self) -> tuple[int, ...]:
        """For each value the last backward time at which it may be needed; -1 if none."""
        ends = []
        for v in range(len(self.graph.values)):
            uses = [self.direct[v][-1]] if self.direct[v] else []
            uses += [self.triggers[c][-1] for c in self.consumers[v]]
            ends.append(max(uses, default=-1))
        return tuple(ends)

    @cached_property
    def last_forward_use(self) -> tuple[int, ...]:
        """For each value the last forward time that makes or reads it."""
        cut = self.graph.num_forward
        return tuple(
            max([value.node, *(t for t in users if t < cut)])
            for value, users in zip(self.graph.values, self.graph.users, strict=True)
        )

    @cached_property
    def fixed_bytes(self) -> np.ndarray:
        """For each time the bytes that are there if every droppable value is dropped and none made again."""
        graph, cut, count = self.graph, self.graph.num_forward, len(self.graph.nodes)
        droppable = set(self.droppable)
        delta = np.zeros(count + 1, dtype=np.int64)
        for v, value in enumerate(graph.values):
            if value.is_held:
                last = count - 1
            elif value.node >= cut:
                last = max([value.node, *graph.users[v]])
            elif v in droppable:
                last = self.last_forward_use[v]
            else:
                last = max(self.last_forward_use[v], self.end[v])
            delta[value.node] += value.size_bytes
            delta[last + 1] -= value.size_bytes
        workspace = np.array([node.workspace_bytes for node in graph.nodes], dtype=np.int64)
        return np.cumsum(delta[:-1]) + workspace

    def remade(self, retained: np.ndarray) -> dict[int, np.ndarray]:
        """For each forward node that may run again: how far it has, at each backward time.

        The least solution of the implications (3) and (4) of FORMULATIONS.md, for fractional choices too.

        Args:
            retained: share of each value that is retained, in [0, 1]; 1 for what is not droppable.

        Returns:
            Node -> array over backward times, in [0, 1], non-decreasing.
        """
        graph, cut = self.graph, self.graph.num_forward
        span = len(graph.nodes) - cut
        made: dict[int, np.ndarray] = {}
        for k in range(cut - 1, -1, -1):
            if not self.triggers[k]:
                continue
            z = np.zeros(span)
            for v in graph.nodes[k].outputs:
                missing = 1.0 - retained[v]
                if missing <= 0.0:
                    continue
                if self.direct[v]:
                    first = self.direct[v][0] - cut
                    np.maximum(z[first:], missing, out=z[first:])
                for c in self.consumers[v]:
                    np.maximum(z, made[c] - retained[v], out=z)
            made[k] = z
        return made

    def profile_bytes(self, retained: np.ndarray, remade: dict[int, np.ndarray]) -> np.ndarray:
        """Memory at each time, as the formulation counts it.

        Args:
            retained: as in `remade`.
            remade: its answer.

        Returns:
            Bytes at each time, static memory not included.
        """
        graph, cut = self.graph, self.graph.num_forward
        profile = self.fixed_bytes.astype(np.float64)
        for v in self.droppable:
            value, end = graph.values[v], self.end[v]
            profile[self.last_forward_use[v] + 1 : cut] += value.size_bytes * retained[v]
            z = remade[value.node][: end + 1 - cut]
            there = (
                np.maximum(retained[v], z) if len(graph.nodes[value.node].outputs) > 1 else retained[v] + z
            )
            profile[cut : end + 1] += value.size_bytes * np.minimum(there, 1.0)
        return profile


def _bits(mask: int, *, offset: int) -> tuple[int, ...]:
    """Positions of the set bits, plus an offset."""
    octets = np.frombuffer(mask.to_bytes(-(-mask.bit_length() // 8), "little"), dtype=np.uint8)
    positions = np.flatnonzero(np.unpackbits(octets, bitorder="little"))
    return tuple((positions + offset).tolist())
