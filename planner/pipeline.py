"""plan() and apply(): the arrows of the data path, one call each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.capturing.optimizer_step import Optimizers
from planner.inputs.workload import Workload
from planner.lower.compile import check_model
from planner.lower.module import PlannedModule
from planner.lower.other_batch import bytes_of
from planner.plan_file import ExecutorName, Plan
from planner.prepare import prepare, prepare_workload
from planner.prepared import Prepared, plan_within
from planner.problem import Budget, Objective
from planner.solvers import DEFAULT_SOLVER
from planner.solving import chosen_solver

# A batch of other sizes waits for its plan: a good one soon is better than the best one late.
_REPLAN_LIMIT_S, _REPLAN_GAP = 10.0, 0.01


def plan(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    budget: str,
    hardware: str = "host",
    optimizer: Optimizers | None = None,
    world_size: int = 1,
    accumulation: int = 1,
    measurements: str | Path | None = None,
    time_limit_s: float = 20.0,
    gap: float = 0.002,
    solver: str = DEFAULT_SOLVER,
    free_order: bool = False,
    minimize: Objective = "time",
    executor: ExecutorName = "aten",
) -> Plan:
    """Decide what the training step of a model retains and what it rematerializes.

    Nothing of the model's size is allocated; parameters may be on the meta device.

    Args:
        model: in training mode.
        batch: one micro-batch of one rank: (inputs, targets) with a loss, the inputs without one.
        loss: ``loss(outputs, targets)`` -> scalar, run outside the planned module; None if the model returns
            its loss.
        budget: bytes of one rank with a unit ("4GiB"), a share of the peak with everything retained ("60%"),
            a share of the activations at that peak ("50% of activations"), or "none".
        hardware: exact name of a device of `cost_models`, a file of one's own that ends in ".toml", or "host".
        optimizer: builds the optimizer of a module; its state is charged. Of several, which come one after the
            other in a run, the largest is. None charges nothing.
        world_size: data-parallel ranks; more than one charges gradient buckets.
        accumulation: micro-batches in one step of the optimizer.
        measurements: file or folder that ``lowtide calibrate`` wrote, of the hardware; None prices operations with
            the roofline.
        time_limit_s: wall-clock seconds of the search.
        gap: share of the step's time that may stay unproven.
        solver: name of the algorithm.
        free_order: the solver may change the order of the operations.
        minimize: "time", or "energy" at the powers of the hardware.
        executor: "aten" runs the operations of eager mode one by one; "inductor" fuses them into kernels with
            torch's code generator, equal to eager up to rounding.

    Returns:
        A plan whose replayed peak is within the budget.

    Raises:
        CaptureError: the step cannot be captured.
        InfeasibleError: no plan was found within the budget; carries the smallest budget that works.
        SolverError: the solver itself failed.
        ValueError: a malformed budget, unknown hardware or solver.
    """
    Budget.parse(budget)
    chosen_solver(solver, time_limit_s=time_limit_s, free_order=free_order)
    prepared = prepare(
        model,
        batch,
        loss=loss,
        hardware=hardware,
        optimizer=optimizer,
        world_size=world_size,
        accumulation=accumulation,
        measurements=measurements,
        executor=executor,
    )
    return plan_within(
        prepared,
        budget=budget,
        time_limit_s=time_limit_s,
        gap=gap,
        solver=solver,
        free_order=free_order,
        minimize=minimize,
    )


def plan_workload(
    workload: Workload,
    *,
    device: str = "cpu",
    optimizer: Optimizers | None = None,
    world_size: int = 1,
    accumulation: int = 1,
) -> Plan:
    """Plan what a file names; model and batch are built without memory, the loss lies inside the module.

    Args:
        workload: model, batch, loss, optimizer, hardware, budget.
        device: type of the device that the step will run on.
        optimizer: as for `plan`; None takes the workload's.
        world_size: as for `plan`.
        accumulation: as for `plan`.

    Returns:
        A plan for `StepModule(model, loss)`, or for the model itself where it returns its loss.

    Raises:
        WorkloadError: model, batch, loss or optimizer cannot be made.
        CaptureError, InfeasibleError, ValueError: as for `plan`.
    """
    prepared = prepare_workload(
        workload, device=device, optimizer=optimizer, world_size=world_size, accumulation=accumulation
    )
    return plan_prepared(prepared, workload)


def plan_prepared(prepared: Prepared[Plan], workload: Workload) -> Plan:
    """Plan a prepared step with the budget and the solver that its file names."""
    return plan_within(
        prepared,
        budget=workload.budget,
        time_limit_s=workload.solver.time_limit_s,
        gap=workload.solver.gap_share,
        solver=workload.solver.name,
        free_order=workload.solver.free_order,
        minimize=workload.solver.minimize,
    )


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as a module that executes the plan.

    Same parameters, outputs, gradients and state dict; the step is captured again at the first call and must be
    the plan's, or `PlanMismatchError` names the first difference.

    Args:
        model: the one that was planned, with real parameters.
        plan: made by `plan`.

    Returns:
        A module to use like the model.

    Raises:
        PlanMismatchError: another torch, another device, other parameters.
    """
    check_model(plan, model)
    return PlannedModule(model, plan, replan=_replanned)


def _replanned(model: nn.Module, inputs: Any, plan: Plan) -> Plan:
    """A plan for a batch of other sizes, within the same budget and beside the same static memory.

    Raises:
        InfeasibleError: none fits.
    """
    prepared = prepare(
        model,
        inputs,
        hardware=plan.hardware,
        world_size=plan.provenance.world_size,
        accumulation=plan.provenance.accumulation,
        executor=plan.provenance.executor,
    )
    here = prepared.problem.static
    # The optimizer's state and what else the plan counted is there for this batch too.
    counted = here.resident_bytes - here.batch_bytes + bytes_of(plan.signature.inputs)
    elsewhere = plan.static_bytes - counted
    static = dataclasses.replace(here, unexplained_bytes=max(0, elsewhere))
    return plan_within(
        prepared.with_problem(dataclasses.replace(prepared.problem, static=static)),
        budget=f"{plan.budget_bytes}B",
        time_limit_s=_REPLAN_LIMIT_S,
        gap=_REPLAN_GAP,
        solver=DEFAULT_SOLVER,
        free_order=False,
    )
