"""Plan: a schedule, what it promises, and where it comes from; the one thing that crosses a process border."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from planner.schedule import Compute, Free, Instruction, Schedule
from planner.step_table import StepTable
from planner.whole_file import write_whole

# What runs the halves of a step: operation by operation, or kernels that torch's code generator fuses.
ExecutorName = Literal["aten", "inductor"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Signature(_Frozen):
    """What a plan is valid for, in words that an error can compare one by one.

    Attributes:
        torch_version: of the capture; operators differ between releases.
        training: mode of the module.
        device: type of the device that the step runs on.
        inputs: "name: dtype [shape]" of every leaf of the model's inputs.
        parameters: the same for every parameter and buffer, with "(frozen)" where no gradient is asked.
        gradient_layouts: of the gradient of each output where it is not the output's own, as
            `planner.lower.tangents` writes it; () where all are.
        model_digest: SHA-256 of the model's joint graph.
    """

    torch_version: str
    training: bool
    device: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    gradient_layouts: tuple[str, ...] = ()
    model_digest: str


class Provenance(_Frozen):
    """Where a plan comes from.

    Attributes:
        lowtide_version: that made it.
        hardware: name, or own file, of the device that it was priced on.
        cost_model: name of the cost model.
        workspace: whether the memory that kernels allocate on the way was measured on this device and counted.
        world_size: data-parallel ranks.
        accumulation: micro-batches in one step of the optimizer.
        executor: that it was captured for and that runs it.
    """

    lowtide_version: str
    hardware: str
    cost_model: str
    workspace: str
    world_size: int
    accumulation: int
    executor: ExecutorName = "aten"


class Plan(_Frozen):
    """What each rank executes, and what it may expect.

    All bytes are of one rank, static memory included: what its allocator has given out.

    Attributes:
        format: version of this file's layout; 1 had no table.
        graph_hash: SHA-256 of the whole step's graph, loss included.
        signature: what it is valid for.
        provenance: where it comes from.
        status: "optimal" within the asked gap, or "feasible".
        solver: that found the schedule.
        gap: share of the step's time that is not proven necessary.
        solve_s: seconds of the search.
        num_nodes: of the step.
        num_forward: nodes of forward; then come `num_loss` nodes of a loss outside the module, then backward.
        num_loss: nodes of the loss.
        num_forward_values: values that forward makes; then come `num_loss_values`.
        num_loss_values: values that the loss makes.
        num_rematerialized: second runs in the schedule.
        budget_bytes: what was allowed.
        predicted_peak_bytes: peak of the schedule.
        retained_all_peak_bytes: peak with everything retained.
        static_bytes: there from the first to the last operation.
        step_s: seconds of the step with everything retained, by the cost model.
        energy_j: joules of the planned step on one device; None where none were counted.
        extra_time_fraction: rematerialization over `step_s`.
        peak_owner: operation that runs when the schedule peaks.
        instructions: k >= 0 computes node k, -(v + 1) frees value v.
        timeline_bytes: memory while each computation runs.
        retained_all_timeline_bytes: the same with everything retained.
        table: the step's graph, for `lowtide explain`; None in a file of format 1.
    """

    format: Literal[1, 2] = 2
    graph_hash: str
    signature: Signature
    provenance: Provenance
    status: Literal["optimal", "feasible"]
    solver: str
    gap: float
    solve_s: float
    num_nodes: int
    num_forward: int
    num_loss: int
    num_forward_values: int
    num_loss_values: int
    num_rematerialized: int
    budget_bytes: int
    predicted_peak_bytes: int
    retained_all_peak_bytes: int
    static_bytes: int
    step_s: float
    energy_j: float | None = None
    extra_time_fraction: float
    peak_owner: str
    instructions: tuple[int, ...]
    timeline_bytes: tuple[int, ...]
    retained_all_timeline_bytes: tuple[int, ...]
    table: StepTable | None = None

    @model_validator(mode="after")
    def _instructions_are_of_the_step(self) -> Self:
        if any(i >= self.num_nodes for i in self.instructions):
            raise ValueError(f"an instruction computes a node beyond the {self.num_nodes} of the step")
        if self.table is not None and len(self.table.names) != self.num_nodes:
            raise ValueError(f"the table has {len(self.table.names)} nodes, the step {self.num_nodes}")
        if self.table is not None and any(-i > len(self.table.makers) for i in self.instructions):
            raise ValueError(f"an instruction frees a value beyond the {len(self.table.makers)} of the step")
        return self

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan.

        Raises:
            ValueError: the text is not a plan; the sentence names the first thing wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(
                f"this is not a plan of format 1 or 2: {where}: {first['msg']}. Make it again with lowtide plan."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan, whole or not at all.

        Raises:
            ValueError: the path is something else than a regular file, or cannot be written.
        """
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a file.

        Raises:
            ValueError: it cannot be read, or is not a plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"the plan {path} cannot be read: {error}. Name a file written by --out."
            ) from error
        return cls.from_json(text)

    @property
    def hardware(self) -> str:
        """Name of the device that it was priced on."""
        return self.provenance.hardware

    @property
    def schedule(self) -> Schedule:
        """The whole step, loss included."""
        return Schedule(tuple(Compute(i) if i >= 0 else Free(-i - 1) for i in self.instructions))

    def schedule_of_model(self) -> Schedule:
        """The part that the planned module executes: forward and backward without an outside loss."""
        kept: list[Instruction] = []
        for step in self.schedule.instructions:
            if isinstance(step, Compute):
                index = _without(step.node, self.num_forward, self.num_loss)
                kept += [] if index is None else [Compute(index)]
            else:
                index = _without(step.value, self.num_forward_values, self.num_loss_values)
                kept += [] if index is None else [Free(index)]
        return Schedule(tuple(kept))


def _without(index: int, start: int, count: int) -> int | None:
    """The index after `count` entries from `start` on are left out; None for one of them."""
    if index < start:
        return index
    return None if index < start + count else index - count


def instructions_of(schedule: Schedule) -> tuple[int, ...]:
    """The schedule as integers, as `Plan.instructions` holds it."""
    return tuple(i.node if isinstance(i, Compute) else -i.value - 1 for i in schedule.instructions)
