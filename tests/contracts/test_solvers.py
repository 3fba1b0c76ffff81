"""What every solver must do; a new file in planner/solvers is found by its name and tested here."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import planner.solvers
from planner.problem import Problem
from planner.simulate import simulate
from planner.solution import Status
from tests.graphs import chain, priced, problem, random_training_graph
from tests.oracle import best_time_s


def solvers() -> list[Any]:
    """One instance of every class whose `name` is that of its file."""
    found = []
    for module_info in pkgutil.iter_modules(planner.solvers.__path__):
        module = importlib.import_module(f"planner.solvers.{module_info.name}")
        found += [
            kind()
            for kind in vars(module).values()
            if isinstance(kind, type) and getattr(kind, "name", None) == module_info.name
        ]
    return found


def problems() -> list[Problem]:
    """Tiny problems from roomy to impossible."""
    graphs = [chain((2, 3, 4, 5)), chain((5, 1, 5, 1))] + [
        random_training_graph(seed, num_forward=6) for seed in range(6)
    ]
    costed = [priced(graph, seed=index) for index, graph in enumerate(graphs)]
    return [problem(one, budget, parameter_bytes=3) for one in costed for budget in (4, 12, 20, 30, 60)]


def test_every_known_solver_is_found():
    assert {solver.name for solver in solvers()} >= {"materialization", "retain_all"}


@pytest.mark.parametrize("solver", solvers(), ids=lambda solver: solver.name)
def test_every_answer_is_within_the_budget_and_no_better_than_the_optimum(solver: Any):
    for asked in problems():
        solution = solver.solve(asked)
        assert solution.solver == solver.name or solver.name == "auto"
        assert (solution.schedule is None) == (solution.status in (Status.INFEASIBLE, Status.NOT_FOUND))
        if solution.schedule is None:
            assert solution.time_s == float("inf")
            continue
        trace = simulate(asked, solution.schedule)
        assert trace.peak_bytes <= asked.budget_bytes
        assert trace.time_s == pytest.approx(solution.time_s)
        assert 0.0 <= solution.gap < 1.0
        assert solution.time_s >= best_time_s(asked) - 1e-9


@pytest.mark.parametrize("name", ["checkmate", "materialization", "staged"])
def test_the_first_solve_of_a_process_writes_nothing(name: str):
    # HiGHS 1.16 prints a header before it can be asked not to, and once in a process only.
    code = f"""
from planner.solvers import solver_named
from tests.contracts.test_solvers import problems
print([solver_named({name!r}).solve(asked).status.value for asked in problems()[:20]])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['")
    assert done.stdout.count("\n") == 1
