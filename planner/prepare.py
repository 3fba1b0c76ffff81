"""A model, or what a file names, -> its training step, captured and priced: all that a plan needs but a budget."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cost_models.hardware import HOST, load_hardware
from planner.capture import Captured, capture
from planner.capturing.optimizer_step import Optimizers
from planner.capturing.rank_memory import Sharding
from planner.capturing.static import static_memory
from planner.capturing.workspace import with_workspaces
from planner.costed import priced
from planner.graph import Phase
from planner.inputs.workload import Workload
from planner.lower.fakes import building_without_memory
from planner.lower.trace import profiler_is_on
from planner.plan_file import ExecutorName, Plan, Provenance, instructions_of
from planner.prepared import Prepared
from planner.pricing import cost_model_of
from planner.problem import Problem
from planner.schedule import Compute
from planner.simulate import Trace
from planner.solution import Solution, Status
from planner.step import StepModule
from planner.step_table import StepTable


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
    place = load_hardware(hardware).place
    cost_model = cost_model_of(
        place,
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
        hardware=place,
        workspace=workspace,
        world_size=world_size,
        accumulation=accumulation,
        executor=executor,
    )
    return Prepared.of(
        Problem(priced(graph, cost_model), 0, static),
        hardware=place,
        written=functools.partial(_plan_of, captured, provenance),
    )


def _device_type(model: nn.Module) -> str:
    """Type of the device that the step will run on: that of the parameters, or the CPU while they lie nowhere."""
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    return min(kinds, default="cpu")


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
        hardware=workload.hardware_place,
        optimizer=optimizer or workload.optimizer.factories(),
        world_size=world_size,
        accumulation=accumulation,
        measurements=workload.measurements_path,
        executor=workload.executor,
        sharding=sharding,
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
        energy_j=sum(costed.energy_j[node] for node in solution.schedule.node_order)
        if costed.energy_j
        else None,
        extra_time_fraction=costed.extra_time_fraction(trace.time_s),
        peak_owner=peak_owner,
        instructions=instructions_of(solution.schedule),
        timeline_bytes=trace.timeline_bytes,
        retained_all_timeline_bytes=retained_all.timeline_bytes,
        table=StepTable.of(costed),
    )
