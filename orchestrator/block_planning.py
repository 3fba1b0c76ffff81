"""Plan a job's step block by block: for ranks that share the model, and for models too large to plan in one."""

from __future__ import annotations

from cost_models.cluster import ClusterSpec
from cost_models.cluster_file import host_cluster
from cost_models.hardware import HOST, load_hardware
from cost_models.units import format_bytes
from orchestrator.job import JobSpec
from orchestrator.size_job import sized_step
from orchestrator.sizing import Sizing
from orchestrator.step_shape import Shape
from planner.blockwise.pieces import Block, pieces_of
from planner.blockwise.plans import BlockwisePlan, plan_of_option
from planner.blockwise.profile import Chosen, Profile
from planner.errors import CaptureError, InfeasibleError
from planner.measure import threads
from planner.prepare import step_of
from planner.problem import Budget
from planner.step import StepModule


def is_planned_blockwise(job: JobSpec) -> bool:
    """Whether the ranks of a job run a plan for each block, and not one for the whole step."""
    return (job.train.planning or ("whole" if job.train.sharding == "ddp" else "blocks")) == "blocks"


def plan_job_blocks(job: JobSpec) -> BlockwisePlan:
    """What each block of each rank of a job retains, with what the rank holds besides charged.

    Raises:
        planner.InfeasibleError: no options of the blocks fit the budget.
        planner.CaptureError: the step cannot be taken apart.
        WorkloadError: model, batch, loss or optimizer cannot be made.
    """
    train = job.train
    shape = Shape(train.workers, train.sharding, job.micro_batch, job.planned_accumulation)
    with threads(train.threads_per_worker):
        node = _one_node(job)
        step = sized_step(job, node)
        if step.profiles is None:
            raise CaptureError(
                "the model has no blocks that repeat, each called once with tensors, so it cannot be planned block "
                "by block; set train.planning to whole"
            )
        sizing = Sizing(step, node, budget_bytes=None)
        profile, (static, after) = sizing.profile(shape), sizing.held_bytes(shape)
        fastest = profile.fastest
        everything = max(static + fastest.peak_bytes, after)
        budget = Budget.parse(job.budget).resolve_bytes(
            retained_all_peak_bytes=everything, resident_bytes=static
        )
        chosen = profile.within(budget - static)
        if chosen is None or after > budget:
            need = max(static + profile.smallest_bytes, after)
            raise InfeasibleError(
                f"no options of the blocks fit {format_bytes(budget)}; the least that any of them need is "
                f"{format_bytes(need)} for one rank. Raise the budget, or take a smaller micro-batch.",
                budget_bytes=budget,
                smallest_feasible_bytes=need,
                owner="blocks",
            )
        plans, numbers = _plans(job, profile, chosen, step.blocks)
    return BlockwisePlan(
        budget_bytes=budget,
        predicted_peak_bytes=max(static + chosen.peak_bytes, after),
        retained_all_peak_bytes=everything,
        extra_time_fraction=chosen.time_s / fastest.time_s - 1.0,
        plans=plans,
        blocks=numbers,
    )


def _one_node(job: JobSpec) -> ClusterSpec:
    """The workers of a job on one machine of its hardware: planning does not look at links."""
    workers = job.train.workers
    if job.hardware == HOST:
        return host_cluster(workers)
    device = load_hardware(job.hardware_place)
    link = device.links.get("peer") or device.links.get("host")
    return ClusterSpec(device.name, device, num_nodes=1, devices_per_node=workers, node_link=link)


def _plans(
    job: JobSpec, profile: Profile, chosen: Chosen, names: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The distinct plans, and the number of each block that does not retain everything."""
    module, batch = step_of(job, device=job.train.device)
    pieces = pieces_of(module, batch, blocks=names)
    by_name: dict[str, Block] = {name: block for block in pieces.blocks for name in block.names}
    plans: list[str] = []
    known: dict[tuple[int, int], int] = {}
    numbers: dict[str, int] = {}
    for at, (name, number) in enumerate(zip(pieces.order, chosen.options, strict=True)):
        if number == 0:
            continue
        key = (profile.kinds[at], number)
        if key not in known:
            known[key] = len(plans)
            plan = plan_of_option(by_name[name], profile.option(at, number), hardware=job.hardware_place)
            plans.append(plan.to_json())
        own = name.removeprefix("model.") if isinstance(module, StepModule) else name
        numbers[own] = known[key]
    return tuple(plans), numbers
