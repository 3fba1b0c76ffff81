"""The order of the nodes is a choice too: annealing over topological orders, so that less must run again."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from planner.costed import CostedGraph
from planner.graph import Graph
from planner.problem import Problem
from planner.schedule import Compute, Free, Instruction, Schedule

# Random greedy orders that annealing may begin with, besides the given one.
_GREEDY_STARTS = 10
# The temperature falls from this share of the room by this many e-foldings.
_START_TEMPERATURE, _COOLING = 0.02, 6.0
_MEAN_MOVE = 12.0


@dataclass(frozen=True)
class Reordered:
    """A problem whose nodes are listed in another order.

    Attributes:
        problem: with the nodes in the new order; values keep their indices.
        order: new position -> index in the given graph.
    """

    problem: Problem
    order: tuple[int, ...]

    def in_given_indices(self, schedule: Schedule) -> Schedule:
        """A schedule of the reordered problem as one of the given problem."""
        steps: list[Instruction] = [
            Compute(self.order[step.node]) if isinstance(step, Compute) else Free(step.value)
            for step in schedule.instructions
        ]
        return Schedule(tuple(steps))


def reordered(problem: Problem, order: Sequence[int]) -> Reordered:
    """List the nodes in another topological order.

    Args:
        problem: as given.
        order: new position -> index.

    Raises:
        ValueError: the order uses a value before it is made, or mixes the phases.
    """
    graph, times = problem.costed.graph, problem.costed.time_s
    position = {node: place for place, node in enumerate(order)}
    values = tuple(
        type(value)(value.name, value.size_bytes, position[value.node], value.kind, value.first_run_only)
        for value in graph.values
    )
    again = Graph(tuple(graph.nodes[k] for k in order), values)
    costed = CostedGraph(again, tuple(times[k] for k in order))
    return Reordered(Problem(costed, problem.budget_bytes, problem.static), tuple(order))


def flatter_order(problem: Problem, *, time_limit_s: float, seed: int = 0) -> tuple[int, ...]:
    """A topological order in which little memory, summed over the nodes, passes the budget.

    Nodes stay in their phase; random nodes and those that write buffers stay in order among themselves.

    Args:
        problem: graph, budget, static memory; seconds are not read.
        time_limit_s: wall-clock seconds; the search ends early when nothing passes the budget.
        seed: of the random moves.

    Returns:
        New position -> index; the given order where nothing better is found.
    """
    begin = time.perf_counter()
    rng = random.Random(seed)
    graph = problem.costed.graph
    room = float(problem.budget_bytes - problem.static.resident_bytes)
    best = _Line(graph, range(len(graph.nodes)), room)
    for attempt in range(_GREEDY_STARTS):
        if best.excess == 0.0 or time.perf_counter() - begin > 0.3 * time_limit_s:
            break
        line = _Line(graph, _greedy(graph, rng, noise=0.5 if attempt else 0.0), room)
        if line.excess < best.excess:
            best = line
    if best.excess > 0.0:
        best.anneal(rng, begin + time_limit_s)
    return tuple(best.best_order)


def predecessors(graph: Graph) -> list[set[int]]:
    """For each node those that must run before it: makers of its inputs, and the ordered one before it."""
    before: list[set[int]] = []
    last: int | None = None
    for index, node in enumerate(graph.nodes):
        row = {graph.values[v].node for v in node.inputs}
        if node.keeps_place:
            if last is not None:
                row.add(last)
            last = index
        before.append(row)
    return before


def _greedy(graph: Graph, rng: random.Random, *, noise: float) -> list[int]:
    """Of the nodes that can run, the one that adds least memory; phase by phase."""
    phases = {phase: place for place, phase in enumerate(dict.fromkeys(node.phase for node in graph.nodes))}
    before = predecessors(graph)
    after: list[list[int]] = [[] for _ in graph.nodes]
    for index, row in enumerate(before):
        for earlier in row:
            after[earlier].append(index)
    missing = [len(row) for row in before]
    unread = [len(users) for users in graph.users]
    ready = [index for index, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:
        phase = min(phases[graph.nodes[index].phase] for index in ready)
        choice, least = -1, math.inf
        for index in ready:
            node = graph.nodes[index]
            if phases[node.phase] != phase:
                continue
            added = sum(
                graph.values[v].size_bytes for v in node.outputs if unread[v] or graph.values[v].is_held
            )
            added -= sum(
                graph.values[v].size_bytes
                for v in set(node.inputs)
                if unread[v] == 1 and not graph.values[v].is_held
            )
            score = added * (1.0 + noise * rng.random())
            if score < least:
                choice, least = index, score
        ready.remove(choice)
        order.append(choice)
        for v in set(graph.nodes[choice].inputs):
            unread[v] -= 1
        for later in after[choice]:
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    return order


class _Line:
    """An order under moves of single nodes, with its memory profile.

    Attributes:
        excess: bytes above the room, summed over the nodes.
        best_order: with the least excess so far.
    """

    def __init__(self, graph: Graph, order: Sequence[int], room: float) -> None:
        self.room = room
        self.order = list(order)
        count = len(self.order)
        self.position = [0] * count
        for place, node in enumerate(self.order):
            self.position[node] = place
        self.inputs = [tuple(dict.fromkeys(node.inputs)) for node in graph.nodes]
        self.outputs = [node.outputs for node in graph.nodes]
        self.workspace = [float(node.workspace_bytes) for node in graph.nodes]
        self.size = [float(value.size_bytes) for value in graph.values]
        self.users = graph.users
        self.is_held = [value.is_held for value in graph.values]
        self.before = predecessors(graph)
        self.after: list[set[int]] = [set() for _ in range(count)]
        for index, row in enumerate(self.before):
            for earlier in row:
                self.after[earlier].add(index)
        self.bounds: list[tuple[int, int]] = []
        first = 0
        for index, node in enumerate(graph.nodes):
            if node.phase is not graph.nodes[first].phase:
                self.bounds += [(first, index)] * (index - first)
                first = index
        self.bounds += [(first, count)] * (count - first)
        self.profile = [0.0] * count
        self.behind = [0.0] * count
        self._replay(0, count)
        self.excess = self._excess(0, count)
        self.best_order = list(self.order)

    def anneal(self, rng: random.Random, deadline: float) -> None:
        """Move single nodes; worse orders are taken with a probability that falls; ends early without excess."""
        begin = time.perf_counter()
        span = max(deadline - begin, 1e-9)
        count, least, tries = len(self.order), self.excess, 0
        temperature = hot = _START_TEMPERATURE * max(self.room, 1.0)
        while least > 0.0:
            if tries % 64 == 0:
                share = (time.perf_counter() - begin) / span
                if share >= 1.0:
                    return
                temperature = hot * math.exp(-_COOLING * share)
            tries += 1
            node = rng.randrange(count)
            place = self.position[node]
            first, stop = self.bounds[node]
            low = max((self.position[k] + 1 for k in self.before[node]), default=first)
            high = min((self.position[k] - 1 for k in self.after[node]), default=stop - 1)
            low, high = max(low, first), min(high, stop - 1)
            if low >= high:
                continue
            step = max(1, int(abs(rng.gauss(0.0, _MEAN_MOVE))))
            target = min(max(place + (step if rng.random() < 0.5 else -step), low), high)
            if target == place:
                continue
            change = self._move(node, place, target, rng, temperature)
            if change is not None:
                self.excess += change
                if self.excess < least - 1e-9 * self.room:
                    self.best_order = list(self.order)
                    least = self.excess if self.excess > 1e-6 else 0.0

    def _move(
        self, node: int, place: int, target: int, rng: random.Random, temperature: float
    ) -> float | None:
        """Move the node if that is taken; the change of the excess, or None."""
        first, stop = min(place, target), max(place, target) + 1
        order, profile, behind = self.order[first:stop], self.profile[first:stop], self.behind[first:stop]
        before = self._excess(first, stop)
        self.order[first:stop] = [*order[1:], node] if place < target else [node, *order[:-1]]
        for i in range(first, stop):
            self.position[self.order[i]] = i
        self._replay(first, stop)
        change = self._excess(first, stop) - before
        if change <= 0.0 or rng.random() < math.exp(-change / temperature):
            return change
        self.order[first:stop], self.profile[first:stop], self.behind[first:stop] = order, profile, behind
        for i in range(first, stop):
            self.position[self.order[i]] = i
        return None

    def _excess(self, first: int, stop: int) -> float:
        room = self.room
        return sum(bytes_ - room for bytes_ in self.profile[first:stop] if bytes_ > room)

    def _replay(self, first: int, stop: int) -> None:
        """Profile of the places from first to stop."""
        position, users, size = self.position, self.users, self.size
        live = self.behind[first - 1] if first else 0.0
        for place in range(first, stop):
            node = self.order[place]
            for v in self.outputs[node]:
                live += size[v]
            self.profile[place] = live + self.workspace[node]
            for v in self.inputs[node]:
                if self.is_held[v]:
                    continue
                for user in users[v]:
                    if position[user] > place:
                        break
                else:
                    live -= size[v]
            for v in self.outputs[node]:
                if not users[v] and not self.is_held[v]:
                    live -= size[v]
            self.behind[place] = live
