"""plan() and apply(): the arrows of the data path, one call each."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cost_models.hardware import HOST
from planner.capture import Captured, capture
from planner.capturing.optimizer_step import Optimizers
from planner.capturing.rank_memory import Sharding
from planner.capturing.static import static_memory
from planner.capturing.workspace import with_workspaces
from planner.graph import Phase
from planner.inputs.workload import Workload
from planner.lower.compile import check_model
from planner.lower.fakes import building_without_memory
from planner.lower.module import PlannedModule
from planner.lower.other_batch import bytes_of
from planner.lower.trace import profiler_is_on
from planner.plan_file import ExecutorName, Plan, Provenance, instructions_of
from planner.prepared import Prepared, plan_within
from planner.pricing import cost_model_of, priced
from planner.problem import Budget, Problem
from planner.schedule import Compute
from planner.simulate import Trace
from planner.solution import Solution, Status
from planner.solvers import DEFAULT_SOLVER
from planner.solving import chosen_solver
from planner.step import StepModule
from planner.step_table import StepTable

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
        hardware: exact name of a device of `cost_models`, or "host".
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
    )


def prepare(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    hardware: str = HOST,
    optimizer: Optimizers | None = None,
    world_size: int = 1,
    accumulation: int = 1,
    measurements: str | Path | None = None,
    executor: ExecutorName = "aten",
    sharding: Sharding = "ddp",
) -> Prepared[Plan]:
    """Capture and price the training step of a model; the arguments are those of `plan`.

    With ``sharding="fsdp"`` or ``"fsdp_keep"`` the ranks share the model and gather it all together, as a planned
    step needs it.

    Raises:
        CaptureError: the step cannot be captured.
        ValueError: unknown hardware, or measurements that are none of it.
    """
    cost_model = cost_model_of(
        hardware,
        measurements=None if measurements is None else Path(measurements),
        device=_device_type(model),
        processes=world_size,
    )
    captured = capture(model, batch, loss=loss, executor=executor)
    graph, workspace = captured.graph, "not counted"
    if profiler_is_on():
        workspace = "not counted: a profiler is running"
    elif hardware == HOST and captured.signature.device == "cpu":
        graph, num_unknown = with_workspaces(captured.graph, captured.calls)
        workspace = "measured" if not num_unknown else f"measured, {num_unknown} operations unknown"
    static = static_memory(
        captured,
        model,
        optimizer=optimizer,
        world_size=world_size,
        accumulation=accumulation,
        sharding=sharding,
    )
    provenance: dict[str, Any] = dict(
        lowtide_version=importlib.metadata.version("lowtide"),
        hardware=hardware,
        workspace=workspace,
        world_size=world_size,
        accumulation=accumulation,
        executor=executor,
    )
    return Prepared.of(
        Problem(priced(graph, cost_model), 0, static),
        hardware=hardware,
        written=functools.partial(_plan_of, captured, provenance),
    )


def _device_type(model: nn.Module) -> str:
    """Type of the device that the step will run on: that of the parameters, or the CPU while they lie nowhere."""
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    return min(kinds, default="cpu")


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
    )


def step_of(workload: Workload, *, device: str = "cpu") -> tuple[nn.Module, Any]:
    """The module of what a file names, its loss inside, and its batch; both without memory.

    Raises:
        WorkloadError: model, batch or loss cannot be made.
    """
    loss = workload.loss_fn()
    with building_without_memory(), torch.device(device):
        model = workload.build_model(fake=True)
        inputs, targets = workload.example_batch()
    step = model if loss is None else StepModule(model, loss)
    return step.train(), inputs if loss is None else (inputs, targets)


def prepare_workload(
    workload: Workload,
    *,
    device: str = "cpu",
    optimizer: Optimizers | None = None,
    world_size: int = 1,
    accumulation: int = 1,
    sharding: Sharding = "ddp",
) -> Prepared[Plan]:
    """Capture and price what a file names; the arguments are those of `plan_workload` and `prepare`.

    Raises:
        WorkloadError, CaptureError, ValueError: as for `plan_workload`.
    """
    step, batch = step_of(workload, device=device)
    return prepare(
        step,
        batch,
        hardware=workload.hardware,
        optimizer=optimizer or workload.optimizer.factories(),
        world_size=world_size,
        accumulation=accumulation,
        measurements=workload.measurements_path,
        executor=workload.executor,
        sharding=sharding,
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


def _plan_of(
    captured: Captured,
    provenance: dict[str, Any],
    problem: Problem,
    solution: Solution,
    trace: Trace,
    retained_all: Trace,
) -> Plan:
    graph, costed = problem.costed.graph, problem.costed
    assert solution.schedule is not None
    in_loss = [node.phase is Phase.LOSS for node in graph.nodes]
    peak_step = solution.schedule.instructions[trace.peak_instruction]
    if trace.peak_bytes == problem.static.optimizer_step_peak_bytes or not isinstance(peak_step, Compute):
        peak_owner = "optimizer step"
    else:
        peak_owner = graph.nodes[peak_step.node].name
    return Plan(
        graph_hash=graph.digest,
        signature=captured.signature,
        provenance=Provenance(**provenance, cost_model=costed.cost_model),
        status="optimal" if solution.status is Status.OPTIMAL else "feasible",
        solver=solution.solver,
        gap=min(1.0, solution.gap),
        solve_s=solution.solve_s,
        num_nodes=len(graph.nodes),
        num_forward=graph.num_forward,
        num_loss=sum(in_loss),
        num_forward_values=sum(value.node < graph.num_forward for value in graph.values),
        num_loss_values=sum(in_loss[value.node] for value in graph.values),
        num_rematerialized=trace.num_rematerialized,
        budget_bytes=problem.budget_bytes,
        predicted_peak_bytes=trace.peak_bytes,
        retained_all_peak_bytes=retained_all.peak_bytes,
        static_bytes=problem.static.resident_bytes,
        step_s=costed.step_s,
        extra_time_fraction=costed.extra_time_fraction(trace.time_s),
        peak_owner=peak_owner,
        instructions=instructions_of(solution.schedule),
        timeline_bytes=trace.timeline_bytes,
        retained_all_timeline_bytes=retained_all.timeline_bytes,
        table=StepTable.of(costed),
    )
