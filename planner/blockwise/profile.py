"""A step as blocks and the rest around them, with seconds and bytes; and the options that fit a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from planner.blockwise.options import Option
from planner.costed import CostedGraph
from planner.graph import Phase, ValueKind
from planner.problem import Problem, StaticMemory
from planner.simulate import simulate
from planner.solvers.retain_all import retain_all_schedule


@dataclass(frozen=True)
class Rest:
    """What runs around the blocks, in eager mode.

    Attributes:
        time_s: seconds of each stretch: before the first block, between the blocks of forward, from the last block
            of forward to the first of backward, between those of backward, after the last; 2 L + 1 for L blocks.
        peak_bytes: the most in each stretch, blocks not counted.
        place_bytes: what lies there while each block runs: L of forward, then L of backward in the order in which
            they run; its input, output and their gradients included.
        energy_j: joules of all stretches on one device; 0.0 where none are known.
    """

    time_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    place_bytes: tuple[int, ...]
    energy_j: float = 0.0

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.place_bytes) // 2


def rest_of(costed: CostedGraph, order: Sequence[str]) -> Rest:
    """The rest of a step whose blocks are `planner.blockwise.pieces.Place`s.

    Gradients of parameters are not counted: they belong to the memory of the rank.

    Args:
        costed: captured from `Pieces.rest`.
        order: names of the blocks in the order in which they run.
    """
    graph = costed.graph
    problem = Problem(costed, 0, StaticMemory())
    schedule = retain_all_schedule(problem)
    timeline = simulate(problem, schedule).timeline_bytes
    gradients = [0]
    for node in graph.nodes:
        made = (graph.values[v] for v in node.outputs)
        gradients.append(gradients[-1] + sum(v.size_bytes for v in made if v.kind is ValueKind.GRADIENT))
    live = [now - gradients[at + 1] for at, now in enumerate(timeline)]
    places: dict[tuple[str, Phase], list[int]] = {}
    for at, node in enumerate(graph.nodes):
        if node.layer in order:
            places.setdefault((node.layer, node.phase), []).append(at)
    forward = [places[name, Phase.FORWARD] for name in order]
    backward = [places.get((name, Phase.BACKWARD), []) for name in reversed(order)]
    visits = [ats for ats in (*forward, *backward) if ats]
    times_s: list[float] = []
    peaks: list[int] = []
    energy_j = 0.0
    begin = 0
    for ats in (*visits, [len(graph.nodes)]):
        end = ats[0]
        times_s.append(sum(costed.time_s[begin:end]))
        energy_j += sum(costed.energy_j[begin:end])
        peaks.append(max(live[begin:end], default=0))
        begin = max(ats) + 1
    places_bytes = tuple(max(live[at] for at in ats) for ats in visits)
    return Rest(tuple(times_s), tuple(peaks), places_bytes, energy_j)


@dataclass(frozen=True)
class Chosen:
    """An option for each block, and what the step takes with them.

    Attributes:
        options: number of the option of each block, in the order in which they run.
        peak_bytes: the most that the step makes, without what belongs to the rank.
        time_s: seconds of forward and backward.
        energy_j: joules of both on one device; 0.0 where none are known.
    """

    options: tuple[int, ...]
    peak_bytes: int
    time_s: float
    energy_j: float


@dataclass(frozen=True)
class Profile:
    """A step of one micro-batch, ready for any budget.

    Attributes:
        rest: around the blocks.
        kinds: for each block the number of its kind.
        options: of each kind, the fastest first.
    """

    rest: Rest
    kinds: tuple[int, ...]
    options: tuple[tuple[Option, ...], ...]

    def option(self, block: int, number: int) -> Option:
        """One option of a block."""
        return self.options[self.kinds[block]][number]

    def chosen(self, numbers: Sequence[int]) -> Chosen:
        """What the step takes with these options."""
        options = [self.option(block, number) for block, number in enumerate(numbers)]
        return Chosen(
            tuple(numbers),
            self._peak_bytes(options),
            sum(option.time_s for option in options) + sum(self.rest.time_s),
            sum(option.energy_j for option in options) + self.rest.energy_j,
        )

    def _peak_bytes(self, options: Sequence[Option]) -> int:
        rest, count = self.rest, len(options)
        peak, saved = rest.peak_bytes[0], 0
        for at, option in enumerate(options):
            peak = max(peak, rest.place_bytes[at] + saved + option.forward_bytes)
            saved += option.saved_bytes
            peak = max(peak, rest.peak_bytes[at + 1] + saved)
        for at, option in enumerate(reversed(options)):
            saved -= option.saved_bytes
            peak = max(peak, rest.place_bytes[count + at] + saved + option.backward_bytes)
            peak = max(peak, rest.peak_bytes[count + at + 1] + saved)
        return peak

    @property
    def fastest(self) -> Chosen:
        """Everything retained."""
        return self.chosen([0] * len(self.kinds))

    def within(self, budget_bytes: int) -> Chosen | None:
        """The options of least time within a budget, up to one block's step; None where none fits.

        From everything retained, the block whose next option costs the fewest seconds for a byte takes it, the
        earliest first, until the step fits; then blocks go back where that still fits. It is the greedy solution of
        the multiple-choice knapsack, which differs from the best by at most one step of one block.

        Reference: Sinha and Zoltners, 1979, The Multiple-Choice Knapsack Problem.
        """
        numbers = [0] * len(self.kinds)
        taken: list[tuple[int, int, int]] = []
        for block, before, after in self._steps():
            if self.chosen(numbers).peak_bytes <= budget_bytes:
                break
            numbers[block] = after
            taken.append((block, before, after))
        if self.chosen(numbers).peak_bytes > budget_bytes:
            return self._least(budget_bytes)
        for block, before, after in reversed(taken):
            if numbers[block] == after:
                numbers[block] = before
                if self.chosen(numbers).peak_bytes > budget_bytes:
                    numbers[block] = after
        return self.chosen(numbers)

    def _steps(self) -> list[tuple[int, int, int]]:
        """(block, option, next option) by rising seconds for a byte that is no longer retained."""
        hulls = [_hull(options) for options in self.options]
        steps = sorted(
            (slope, block, before, after)
            for block, kind in enumerate(self.kinds)
            for slope, before, after in hulls[kind]
        )
        return [(block, before, after) for _, block, before, after in steps]

    def _uniform(self) -> list[Chosen]:
        """Every block with an option of like number: what retains least may hold most at its worst moment."""
        depth = max((len(options) for options in self.options), default=1)
        return [
            self.chosen([min(number, len(self.options[kind]) - 1) for kind in self.kinds])
            for number in range(depth)
        ]

    def _least(self, budget_bytes: int) -> Chosen | None:
        """The fastest of the uniform choices that fit."""
        fitting = [chosen for chosen in self._uniform() if chosen.peak_bytes <= budget_bytes]
        return min(fitting, key=lambda chosen: chosen.time_s, default=None)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget for which `within` has a choice."""
        numbers = [0] * len(self.kinds)
        peaks = [chosen.peak_bytes for chosen in self._uniform()]
        for block, _, after in self._steps():
            numbers[block] = after
            peaks.append(self.chosen(numbers).peak_bytes)
        return min(peaks)


def _hull(options: Sequence[Option]) -> list[tuple[float, int, int]]:
    """The steps along the lower convex hull of seconds over saved bytes: (seconds a byte, from, to)."""
    corners = [0]
    for at in range(1, len(options)):
        while len(corners) > 1 and _slope(options, corners[-1], at) <= _slope(
            options, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(at)
    return [(_slope(options, a, b), a, b) for a, b in itertools.pairwise(corners)]


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    return (options[b].time_s - options[a].time_s) / max(1, options[a].saved_bytes - options[b].saved_bytes)
