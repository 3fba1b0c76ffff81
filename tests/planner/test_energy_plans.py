"""Plans of least energy: another price, the same promises."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from planner.cli.request import PlanRequest
from planner.costed import CostedGraph
from planner.prepared import Prepared, plan_within
from planner.problem import Objective, Problem, StaticMemory
from planner.schedule import Schedule
from tests.graphs import random_training_graph

QUICKSTART = Path(__file__).parents[2] / "deploy" / "jobs" / "quickstart.yaml"


def prepared_step(seed: int) -> Prepared[Schedule]:
    """A step whose operations take seconds and joules that have nothing to do with each other."""
    rng = random.Random(seed)
    graph = random_training_graph(seed, num_forward=8)
    prices = [tuple(float(rng.randint(1, 100)) for _ in graph.nodes) for _ in range(2)]
    costed = CostedGraph(graph, prices[0], energy_j=prices[1])
    return Prepared.of(
        Problem(costed, 0, StaticMemory()),
        hardware=None,
        written=lambda problem, solution, trace, retained_all: solution.schedule or Schedule(()),
    )


def best(prepared: Prepared[Schedule], minimize: Objective) -> tuple[float, float]:
    """Seconds and joules of the plan."""
    schedule = plan_within(
        prepared,
        budget="90%",
        time_limit_s=10.0,
        gap=0.0,
        solver="auto",
        free_order=False,
        minimize=minimize,
    )
    costed = prepared.problem.costed
    return (
        sum(costed.time_s[node] for node in schedule.node_order),
        sum(costed.energy_j[node] for node in schedule.node_order),
    )


def test_the_plan_of_least_energy_takes_less_energy_and_more_time():
    differ = 0
    for seed in range(8):
        prepared = prepared_step(seed)
        (time_s, energy_j), (slow_s, least_j) = best(prepared, "time"), best(prepared, "energy")
        assert time_s <= slow_s
        assert least_j <= energy_j
        differ += time_s < slow_s and least_j < energy_j
    assert differ >= 3


def test_energy_needs_a_device():
    graph = random_training_graph(0, num_forward=3)
    with pytest.raises(ValueError, match="energy of this step is not known"):
        _ = CostedGraph(graph, (1.0,) * len(graph.nodes)).by_energy
    with pytest.raises(ValueError, match="one energy per node: got 1"):
        CostedGraph(graph, (1.0,) * len(graph.nodes), energy_j=(1.0,))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"job": QUICKSTART, "minimize": "money"}, "must be one of time, energy, got 'money'"),
        ({"job": QUICKSTART, "minimize": "energy", "sweep": True}, "--sweep knows costs in time alone"),
        ({"graph": Path("g.json"), "minimize": "energy"}, "--graph knows costs in time alone"),
    ],
)
def test_questions_without_an_answer_are_refused(asked: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        PlanRequest(**asked)
