"""Seconds of every operation of a step, measured inside the step itself."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import fx, nn

from planner.checking.real_step import RealStep
from planner.costed import CostedGraph
from planner.graph import Phase
from planner.lower.executor import Boxed, Timed
from planner.lower.inductor import with_kernels
from planner.lower.module import PlannedModule
from planner.plan_file import Plan
from planner.prepared import Prepared, plan_within
from planner.solvers.retain_all import RetainAll

T = TypeVar("T")


def with_measured_times(
    prepared: Prepared[Plan], module: nn.Module, step: RealStep, *, steps: int = 9
) -> Prepared[Plan]:
    """The step priced with what its operations take on this device, on these data.

    It runs with everything retained, operation by operation or kernel by kernel; each gets the lower quartile of
    its times (what disturbs a step only adds to them). A loss outside of the module is not timed: its operations
    keep the prices that they have, times the ratio that all others show.

    Args:
        prepared: the step, priced by any cost model.
        module: real; it is changed as by training (buffers, gradients, generators).
        step: its batch and loss.
        steps: that are timed, after one that is not.

    Returns:
        The same step with other seconds.
    """
    plan = plan_within(
        prepared, budget="none", time_limit_s=1.0, gap=0.0, solver=RetainAll.name, free_order=False
    )
    timed = Timed()

    def timed_kernels(half: fx.GraphModule, example_inputs: Any) -> Boxed:
        return timed(with_kernels(half), example_inputs)

    executor = timed_kernels if plan.provenance.executor == "inductor" else timed
    running = dataclasses.replace(step, optimizer=None, accumulation=1).on(
        PlannedModule(module, plan, executor=executor)
    )
    running.timed(seed=0)
    timed.seconds.clear()
    for turn in range(steps):
        running.timed(seed=turn)
        timed.collect()
    costed = prepared.problem.costed
    return prepared.with_problem(dataclasses.replace(prepared.problem, costed=_priced(costed, timed)))


def _usual(seconds: list[float]) -> float:
    """The lower quartile: what disturbs a step only adds to its time."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def _priced(costed: CostedGraph, timed: Timed) -> CostedGraph:
    """The graph with measured seconds where there are some, and the others scaled to them."""
    nodes = costed.graph.nodes
    usual: dict[str, float] = {}
    for call, seconds in timed.seconds.items():
        node = timed.part_of.get(call, call)
        usual[node] = usual.get(node, 0.0) + _usual(seconds)
    measured = [None if node.phase is Phase.LOSS else usual.get(node.name) for node in nodes]
    pairs = [(new, old) for new, old in zip(measured, costed.time_s, strict=True) if new is not None]
    priced = sum(old for _, old in pairs)
    ratio = sum(new for new, _ in pairs) / priced if priced else 1.0
    return CostedGraph(
        costed.graph,
        tuple(old * ratio if new is None else new for new, old in zip(measured, costed.time_s, strict=True)),
        cost_model="measured",
    )
