"""Global batch -> micro-batch x accumulation x workers x sharding x plan: every combination, priced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from cost_models.cluster import ClusterSpec
from cost_models.energy import step_energy_j, work_energy_j
from cost_models.measured import Measured
from cost_models.roofline import CostModel
from cost_models.units import format_bytes
from cost_models.work import Work
from orchestrator.step_shape import Shape, Sized
from orchestrator.step_timeline import BlockTimes, Communication, Timeline, timeline
from planner.blocks import Unit, units
from planner.blockwise.prepare import Profiles
from planner.blockwise.profile import Chosen, Profile
from planner.capturing.optimizer_step import Optimizers, optimizer_bytes
from planner.capturing.rank_memory import RankMemory, Sharding, rank_memory, share_shape
from planner.errors import InfeasibleError
from planner.plan_file import Plan
from planner.prepared import Prepared, plan_within
from planner.problem import Objective

# What the allocator, the driver and the communication library hold of a device, beside tensors.
RESERVED_SHARE = 0.06


@dataclass(frozen=True)
class SizedStep:
    """What must be known of a job's step.

    Attributes:
        model: the module that returns the loss, without memory.
        optimizer: builds its optimizer, or several do, one after the other.
        blocks: names of its repeated blocks; () plans the whole step in one.
        profiles: of the blocks; None where there are none.
        whole: micro-batch and sharing -> the whole step, ready to be planned; None where it is too large for that.
        cost_model: workers of one node -> prices operations.
        optimizer_work: of the (first) optimizer's step on all parameters.
        overlaps: messages travel while the device computes.
        solver_limit_s: of each search for a plan of a whole step.
        objective: what such a plan has least of; plans of blocks are searched for time.
    """

    model: nn.Module
    optimizer: Optimizers
    blocks: tuple[str, ...]
    profiles: Callable[[int], Profiles] | None
    whole: Callable[[Shape], Prepared[Plan]] | None
    cost_model: Callable[[int], CostModel]
    optimizer_work: Work
    overlaps: bool
    solver_limit_s: float
    objective: Objective


class Sizing:
    """Prices shapes of one step on one cluster; what shapes share is computed once.

    Args:
        step: of the job.
        cluster: that it runs on.
        budget_bytes: of one rank; None for the memory of a device less `RESERVED_SHARE`.
    """

    def __init__(self, step: SizedStep, cluster: ClusterSpec, *, budget_bytes: int | None) -> None:
        self._step, self._cluster = step, cluster
        self.budget_bytes = budget_bytes or int(cluster.device.memory_bytes * (1.0 - RESERVED_SHARE))
        self._profiles: dict[tuple[int, int], Profile] = {}
        self._memory: dict[tuple[int, Sharding, bool], RankMemory] = {}
        self._states: dict[int, tuple[int, int]] = {}

    def sized(self, shape: Shape) -> Sized:
        """The shape with its best plan, or why there is none."""
        step = self._step
        if step.whole is not None and shape.sharding == "ddp":
            return self._whole(shape, step.whole)
        if step.profiles is None:
            return Sized(shape, 0, refused="the model has no repeated blocks to gather and plan one by one")
        return self._blockwise(shape)

    def _per_node(self, shape: Shape) -> int:
        return min(shape.workers, self._cluster.devices_per_node)

    def _whole(self, shape: Shape, prepare: Callable[[Shape], Prepared[Plan]]) -> Sized:
        """One plan for the whole step: what `lowtide train` makes for a model that is small enough."""
        prepared = prepare(shape)
        static = prepared.problem.static
        least = max(static.resident_bytes, static.optimizer_step_peak_bytes)
        if least > self.budget_bytes:
            return self._too_large(shape, least)
        try:
            plan = plan_within(
                prepared,
                budget=f"{self.budget_bytes}B",
                time_limit_s=self._step.solver_limit_s,
                gap=0.005,
                solver="auto",
                free_order=False,
                minimize=self._step.objective,
            )
        except InfeasibleError as error:
            return self._too_large(shape, error.smallest_feasible_bytes or 0)
        compute_s = plan.step_s
        forward_backward_s = compute_s * (1.0 + plan.extra_time_fraction)
        # All gradients appear when the one node of autograd returns: nothing is left to hide their reduction.
        exposed_s = self._all_reduce_s(shape)
        return self._priced(
            shape,
            peak_bytes=plan.predicted_peak_bytes,
            compute_s=shape.accumulation * compute_s,
            remat_s=shape.accumulation * (forward_backward_s - compute_s),
            exposed_s=exposed_s,
            passes_j=shape.accumulation * (plan.energy_j or 0.0),
            is_blockwise=False,
        )

    def _all_reduce_s(self, shape: Shape) -> float:
        gradient_bytes = self._rank_memory(shape).gradient_bytes
        return Communication(self._cluster, shape.workers).all_reduce_s(gradient_bytes)

    def _blockwise(self, shape: Shape) -> Sized:
        profile = self.profile(shape)
        static, after = self.held_bytes(shape)
        chosen = profile.within(self.budget_bytes - static)
        if chosen is None or after > self.budget_bytes:
            return self._too_large(shape, max(static + profile.smallest_bytes, after))
        times = self._times(profile, chosen, self._all_profiles(shape).order)
        last = timeline(times, Communication(self._cluster, shape.workers), shape.sharding, is_last=True)
        early = timeline(times, Communication(self._cluster, shape.workers), shape.sharding, is_last=False)
        passes = [early] * (shape.accumulation - 1) + [last]
        if not self._step.overlaps:
            passes = [
                Timeline(t.compute_s, t.compute_s + t.communication_s, t.communication_s) for t in passes
            ]
        compute_s = profile.fastest.time_s
        copies_s = [self._copies_s(shape, is_last=at == len(passes) - 1) for at in range(len(passes))]
        return self._priced(
            shape,
            peak_bytes=max(static + chosen.peak_bytes, after),
            compute_s=shape.accumulation * compute_s,
            remat_s=shape.accumulation * (chosen.time_s - compute_s),
            exposed_s=sum(t.exposed_s for t in passes) + sum(copies_s),
            passes_j=shape.accumulation * chosen.energy_j,
            is_blockwise=True,
        )

    def held_bytes(self, shape: Shape) -> tuple[int, int]:
        """What a rank holds throughout forward and backward, and the most during the optimizer's step."""
        memory = self._rank_memory(shape)
        static = memory.parameter_bytes + memory.buffer_bytes + memory.kept_bytes
        is_ddp = shape.sharding == "ddp"
        static += memory.gradient_bytes if is_ddp else memory.communication_bytes + memory.late_bytes
        if shape.sharding == "ddp" and shape.workers > 1:
            # One gradient lies beside its bucket until it is copied into it.
            static += max((p.numel() * p.element_size() for p in self._step.model.parameters()), default=0)
        static += self._all_profiles(shape).shared_bytes(shape.micro_batch)
        return static, memory.resident_bytes + memory.optimizer_temporary_bytes

    def _copies_s(self, shape: Shape, *, is_last: bool) -> float:
        """What gathering takes beside messages: copies out of and into their buffers, overheads of blocks."""
        if shape.sharding == "ddp":
            return 0.0
        size = sum(p.numel() * p.element_size() for p in self._step.model.parameters())
        num_copies = (2 if shape.sharding == "fsdp" else 1) + is_last
        copied = Work(0.0, num_copies * size, num_copies * size, "float32", "copy")
        model = self._step.cost_model(self._per_node(shape))
        own = model.measurements.block_overheads_s if isinstance(model, Measured) else {}
        return model.time_s(copied) + len(self._units) * own.get(shape.sharding, 0.0)

    def _times(self, profile: Profile, chosen: Chosen, order: Sequence[str]) -> BlockTimes:
        """What the timeline of a micro-batch needs; `order` names the blocks as they run."""
        sizes = {
            unit.name: sum(p.numel() * p.element_size() for p in unit.parameters) for unit in self._units
        }
        options = [profile.option(at, number) for at, number in enumerate(chosen.options)]
        return BlockTimes(
            rest_s=profile.rest.time_s,
            forward_s=tuple(o.forward_s for o in options),
            backward_s=tuple(o.backward_s for o in options),
            block_bytes=tuple(sizes[name] for name in order),
            root_bytes=sizes[""],
        )

    @functools.cached_property
    def _units(self) -> Sequence[Unit]:
        return units(self._step.model, self._step.blocks)

    def _priced(
        self,
        shape: Shape,
        *,
        peak_bytes: int,
        compute_s: float,
        remat_s: float,
        exposed_s: float,
        passes_j: float,
        is_blockwise: bool,
    ) -> Sized:
        # Every micro-batch after the first is added to the gradients there are.
        added, num_added = self._accumulation(), shape.accumulation - 1
        added_s = num_added * self._step.cost_model(self._per_node(shape)).time_s(added)
        compute_s += added_s
        optimizer_s = self._optimizer_s(shape)
        step_s = compute_s + remat_s + exposed_s + optimizer_s
        device = self._cluster.device
        busy_j = passes_j + num_added * work_energy_j(
            added, time_s=added_s / max(1, num_added), hardware=device
        )
        busy_j += work_energy_j(self._optimizer_share(shape), time_s=optimizer_s, hardware=device)
        return Sized(
            shape=shape,
            peak_bytes=peak_bytes,
            step_s=step_s,
            compute_s=compute_s,
            remat_s=remat_s,
            exposed_s=exposed_s,
            optimizer_s=optimizer_s,
            energy_j=step_energy_j(busy_j, hardware=device, exposed_s=exposed_s, world_size=shape.workers),
            is_blockwise=is_blockwise,
        )

    def _accumulation(self) -> Work:
        """Adding a micro-batch's gradients to those there are."""
        gradient_bytes = sum(
            p.numel() * p.element_size() for p in self._step.model.parameters() if p.requires_grad
        )
        return Work(gradient_bytes / 4, 2 * gradient_bytes, gradient_bytes, "float32", "elementwise")

    def _optimizer_s(self, shape: Shape) -> float:
        work = self._step.optimizer_work
        model = self._step.cost_model(self._per_node(shape))
        if shape.sharding == "ddp":
            return model.time_s(work)
        share = self._optimizer_share(shape)
        # The time of a share is that of the whole by its bytes, where only the whole was measured.
        alone = model.time_s(replace(work, operation=""))
        scale = model.time_s(work) / alone if alone else 1.0
        return scale * model.time_s(replace(share, operation=""))

    def _optimizer_share(self, shape: Shape) -> Work:
        """What the optimizer of one rank does."""
        work, parts = self._step.optimizer_work, 1 if shape.sharding == "ddp" else shape.workers
        return replace(
            work,
            flop=work.flop / parts,
            read_bytes=work.read_bytes // parts,
            written_bytes=work.written_bytes // parts,
        )

    def _too_large(self, shape: Shape, need_bytes: int) -> Sized:
        need = f"needs at least {format_bytes(need_bytes)}" if need_bytes else "does not fit"
        return Sized(shape, need_bytes, refused=f"{need} of {format_bytes(self.budget_bytes)} on each rank")

    def profile(self, shape: Shape) -> Profile:
        """The step of one micro-batch, taken apart."""
        key = (self._per_node(shape) if self._cluster.device.kind == "cpu" else 0, shape.micro_batch)
        if key not in self._profiles:
            self._profiles[key] = self._all_profiles(shape).profile(shape.micro_batch)
        return self._profiles[key]

    def _all_profiles(self, shape: Shape) -> Profiles:
        assert self._step.profiles is not None
        return self._step.profiles(self._per_node(shape))

    def _rank_memory(self, shape: Shape) -> RankMemory:
        workers = 2 if shape.sharding == "ddp" and shape.workers > 1 else shape.workers
        key = (workers, shape.sharding, shape.accumulation > 1)
        if key not in self._memory:
            memory = rank_memory(
                self._step.model,
                optimizer=None,
                world_size=workers,
                sharding=shape.sharding,
                blocks=self._step.blocks,
                accumulation=shape.accumulation,
                staging=self._cluster.device.kind == "cpu",
            )
            state_bytes, temporary_bytes = self._optimizer_bytes(
                1 if shape.sharding == "ddp" else shape.workers
            )
            self._memory[key] = replace(
                memory, optimizer_bytes=state_bytes, optimizer_temporary_bytes=temporary_bytes
            )
        return self._memory[key]

    def _optimizer_bytes(self, parts: int) -> tuple[int, int]:
        """State and temporaries of the optimizer on the first of so many shares of every parameter."""
        if parts not in self._states:
            self._states[parts] = optimizer_bytes(
                self._step.model,
                self._step.optimizer,
                shape=functools.partial(share_shape, world_size=parts, rank=0),
            )
        return self._states[parts]
