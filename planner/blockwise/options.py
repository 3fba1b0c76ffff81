"""What one block may retain between its forward and its backward, and what less of it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from planner.costed import CostedGraph
from planner.errors import InfeasibleError
from planner.graph import Graph, Phase, ValueKind
from planner.problem import Problem, StaticMemory
from planner.schedule import Schedule
from planner.simulate import simulate
from planner.solvers.retain_all import retain_all_schedule
from planner.solving import solve

# Shares of what is retained at most that a block may retain.
_SHARES = (0.75, 0.5, 0.35, 0.2, 0.1, 0.03, 0.0)


@dataclass(frozen=True)
class Option:
    """One way to run a block.

    Attributes:
        schedule: of the block's step.
        saved_bytes: retained between its forward and its backward, inputs and outputs not counted.
        forward_bytes: the most during its forward, beside inputs and outputs.
        backward_bytes: the most during its backward, saved bytes included, beside inputs and outputs.
        forward_s: seconds of its forward.
        backward_s: of its backward, rematerialization included.
        energy_j: joules of both on one device; 0.0 where none are known.
    """

    schedule: Schedule
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_s: float
    backward_s: float
    energy_j: float = 0.0

    @property
    def time_s(self) -> float:
        """Seconds of both."""
        return self.forward_s + self.backward_s


def alone(problem: Problem) -> Problem:
    """A block's step without what belongs to the whole: no static memory, no price for what stands for the rest."""
    costed = problem.costed
    in_rest = [node.phase is Phase.LOSS for node in costed.graph.nodes]

    def own(prices: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(0.0 if rest else price for rest, price in zip(in_rest, prices, strict=True))

    energy_j = own(costed.energy_j) if costed.energy_j else ()
    return Problem(
        CostedGraph(costed.graph, own(costed.time_s), costed.cost_model, energy_j), 0, StaticMemory()
    )


def option_of(problem: Problem, schedule: Schedule) -> Option:
    """What a schedule of a block takes; `problem` as `alone` gives it."""
    graph, times, energies = problem.costed.graph, problem.costed.time_s, problem.costed.energy_j
    trace = simulate(problem, schedule)
    order = schedule.node_order
    border = max(at for at, node in enumerate(order) if graph.nodes[node].phase is Phase.LOSS)
    begin = min(at for at, node in enumerate(order) if graph.nodes[node].phase is Phase.LOSS)
    forward, backward = order[:begin], order[border + 1 :]
    outside = _outside_bytes(problem, border)
    held = sum(v.size_bytes for v in graph.values if _is_output(graph, v.node, v.kind))
    return Option(
        schedule=schedule,
        saved_bytes=max(0, trace.timeline_bytes[border] - outside),
        forward_bytes=max(0, max(trace.timeline_bytes[:begin], default=0) - held),
        backward_bytes=max(0, max(trace.timeline_bytes[border + 1 :], default=0) - held),
        forward_s=sum(times[node] for node in forward),
        backward_s=sum(times[node] for node in backward),
        energy_j=sum(energies[node] for node in order) if energies else 0.0,
    )


def _is_output(graph: Graph, node: int, kind: ValueKind) -> bool:
    return kind is ValueKind.OUTPUT and graph.nodes[node].phase is Phase.FORWARD


def _outside_bytes(problem: Problem, border: int) -> int:
    """Bytes at the border between forward and backward that are no saved activations: outputs, their gradient."""
    graph = problem.costed.graph
    schedule = retain_all_schedule(problem)
    at_border = simulate(problem, schedule).timeline_bytes
    order = schedule.node_order
    last = max(at for at, node in enumerate(order) if graph.nodes[node].phase is Phase.LOSS)
    return at_border[last] - _retained_bytes(graph)


def _retained_bytes(graph: Graph) -> int:
    """Activations of forward that backward reads, with everything retained."""
    users = graph.users
    return sum(
        value.size_bytes
        for v, value in enumerate(graph.values)
        if value.kind is ValueKind.ACTIVATION
        and graph.nodes[value.node].phase is Phase.FORWARD
        and any(graph.nodes[user].phase is Phase.BACKWARD for user in users[v])
    )


def options_of(
    problem: Problem, *, time_limit_s: float, shares: Sequence[float] = _SHARES
) -> tuple[Option, ...]:
    """The ways to run a block that no other beats in both saved bytes and seconds; the fastest first.

    The solver limits the bytes at the border between forward and backward: what stands for the rest of the model
    there is given more workspace than anything else in the step needs.

    Args:
        problem: of the block, as `alone` gives it.
        time_limit_s: of each search.
        shares: of what is retained at most.
    """
    graph = problem.costed.graph
    everything = retain_all_schedule(problem)
    best = option_of(problem, everything)
    weight = 4 * sum(value.size_bytes for value in graph.values) + 1
    last = max(at for at, node in enumerate(graph.nodes) if node.phase is Phase.LOSS)
    heavy = list(graph.nodes)
    heavy[last] = dataclasses.replace(heavy[last], workspace_bytes=heavy[last].workspace_bytes + weight)
    weighed = dataclasses.replace(
        problem, costed=dataclasses.replace(problem.costed, graph=Graph(tuple(heavy), graph.values))
    )
    outside = simulate(weighed, everything).peak_bytes - best.saved_bytes
    found = [best]
    for share in shares:
        budget = outside + int(share * best.saved_bytes)
        try:
            solution = solve(
                dataclasses.replace(weighed, budget_bytes=budget), time_limit_s=time_limit_s, gap=0.005
            )
        except InfeasibleError as error:
            if error.smallest is not None and error.smallest.schedule is not None:
                found.append(option_of(problem, error.smallest.schedule))
            break
        assert solution.schedule is not None
        found.append(option_of(problem, solution.schedule))
    return pareto(found)


def pareto(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other beats, by rising time and falling saved bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.time_s, o.saved_bytes)):
        if not kept or option.saved_bytes < kept[-1].saved_bytes:
            kept.append(option)
    return tuple(kept)
