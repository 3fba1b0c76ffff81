"""`lowtide size`: a job on a cluster, every way to divide its step, the best first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from cost_models.cluster import ClusterSpec
from cost_models.hardware import HOST
from cost_models.measured import Measured
from cost_models.roofline import Roofline
from orchestrator.job import JobSpec
from orchestrator.phases import phases_of
from orchestrator.size_limits import limits_of
from orchestrator.sizing import SizedStep, Sizing
from orchestrator.step_shape import Shape, Sized, shapes_of
from planner.blocks import block_names
from planner.blockwise.prepare import Profiles
from planner.calibrating.optimizer_step import optimizer_step
from planner.capturing.fused_attention import FusedAttention
from planner.errors import CaptureError
from planner.measure import threads
from planner.plan_file import Plan
from planner.prepare import prepare_workload, step_of
from planner.prepared import Prepared
from planner.pricing import cost_model_of
from planner.problem import Budget, BudgetKind, Objective
from planner.tradeoff.rebatched import batch_size_of, with_batch_size

# Larger steps are planned block by block: the whole of them takes longer to capture than a table may take.
_LARGEST_WHOLE = 600
Tell = Callable[[str], None]


def size_batches(
    job: JobSpec,
    cluster: ClusterSpec,
    *,
    global_batches: Sequence[int],
    objective: Objective,
    tell: Tell = lambda line: None,
) -> tuple[list[Sized], int]:
    """Every way to run one step of a job on a cluster, the best first, refused ones last.

    Args:
        job: model, optimizer, budget ("none" for the memory of a device).
        cluster: with its device; a job on "host" is priced by its measurements where it names some.
        global_batches: samples of one optimizer step.
        objective: what the best has least of, for a sample.
        tell: called with a line of progress.

    Returns:
        The ways, and the bytes that each rank may take.

    Raises:
        WorkloadError: the job's model, batch, loss or optimizer cannot be made.
        CaptureError: its step cannot be captured.
        ValueError: its budget is no number of bytes.
    """
    kind = Budget.parse(job.budget).kind
    if kind not in (BudgetKind.NONE, BudgetKind.BYTES):
        raise ValueError(
            f"sizing needs a budget in bytes or none, got {job.budget!r}: a share differs from one micro-batch to "
            "the next. Write --budget 30GiB, or none for the memory of a device."
        )
    # No GPU is needed to price one, so its step is traced as on this processor.
    is_stand_in = cluster.device.kind != "cpu" and job.train.device == "cpu"
    with threads(job.train.threads_per_worker), FusedAttention() if is_stand_in else nullcontext():
        tell("capturing the step")
        cluster = with_measured_link(job, cluster)
        step = sized_step(job, cluster, objective)
        sizing = Sizing(step, cluster, budget_bytes=_bytes(job.budget))
        shapes = [shape for batch in global_batches for shape in shapes_of(batch, cluster)]
        limits = limits_of(job, step.model, cluster, shapes)
        found = []
        for at, shape in enumerate(shapes):
            tell(f"{at + 1} of {len(shapes)}: {shape.workers} x {shape.micro_batch}, {shape.sharding}")
            refused = limits.refusal(shape)
            found.append(Sized(shape, 0, refused=refused) if refused else sizing.sized(shape))
    # Of those that are refused the one that lacks the fewest bytes is the nearest.
    order = sorted(found, key=lambda sized: (sized.score(objective), sized.peak_bytes or float("inf")))
    return order, sizing.budget_bytes


def with_measured_link(job: JobSpec, cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with the link between the workers of this machine as it was measured, where it was."""
    path = job.measurements_path
    if path is None or cluster.device.name != HOST or cluster.devices_per_node == 1:
        return cluster
    model = cost_model_of(
        HOST, measurements=path, device=job.train.device, processes=cluster.devices_per_node
    )
    link = model.measurements.link() if isinstance(model, Measured) else None
    return cluster if link is None else dataclasses.replace(cluster, node_link=link)


def _bytes(budget: str) -> int | None:
    parsed = Budget.parse(budget)
    if parsed.kind is BudgetKind.NONE:
        return None
    return parsed.resolve_bytes(retained_all_peak_bytes=0, resident_bytes=0)


def sized_step(job: JobSpec, cluster: ClusterSpec, objective: Objective = "time") -> SizedStep:
    """What sizing must know of a job's step.

    Raises:
        WorkloadError, CaptureError: as for `size_batches`.
    """
    own = batch_size_of(job)
    model, _ = step_of(job, device=job.train.device)
    blocks = block_names(model)
    builds = [phase.make_optimizer for phase in phases_of(job)]

    @functools.cache
    def cost_model(processes: int) -> Roofline | Measured:
        is_here = cluster.device.name == HOST
        return cost_model_of(
            cluster.device.place,
            measurements=job.measurements_path,
            device=job.train.device,
            processes=processes if is_here else 1,
        )

    def make(size: int) -> tuple[nn.Module, Any]:
        return step_of(with_batch_size(job, size), device=job.train.device)

    def whole(shape: Shape) -> Prepared[Plan]:
        return prepare_workload(
            with_batch_size(job, shape.micro_batch).model_copy(update={"hardware": cluster.device.place}),
            device=job.train.device,
            optimizer=builds,
            world_size=shape.workers,
            accumulation=shape.accumulation,
        )

    @functools.cache
    def profiles(processes: int) -> Profiles:
        return Profiles(
            make,
            blocks=blocks,
            sizes=(max(2, own), 2 * max(2, own)),
            cost_model=cost_model(processes),
            workspaces=cluster.device.name == HOST and job.train.device == "cpu",
            each_size=job.measurements_path is not None,
        )

    is_small = True
    if blocks:
        try:
            first = profiles(1 if cluster.device.name != HOST else cluster.devices_per_node)
            is_small = first.num_nodes <= _LARGEST_WHOLE
        except CaptureError:  # the step cannot be taken apart, so it is planned in one
            blocks = ()
    name = f"{job.optimizer.name} {sorted(job.optimizer.hyper.items())}"
    is_cpu = cluster.device.kind == "cpu"
    return SizedStep(
        model=model,
        optimizer=builds,
        blocks=blocks,
        profiles=(lambda processes: profiles(processes if is_cpu else 1)) if blocks else None,
        whole=functools.cache(whole) if is_small else None,
        cost_model=lambda processes: cost_model(processes if is_cpu else 1),
        optimizer_work=optimizer_step(model, builds[0], name=name).work,
        overlaps=not is_cpu,
        solver_limit_s=min(5.0, job.solver.time_limit_s),
        objective=objective,
    )
