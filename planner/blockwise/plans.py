"""The plans of a step's blocks as one file, and how they are made of the options that were chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cost_models.units import format_bytes
from planner.block_plan import half_square
from planner.blockwise.options import Option
from planner.blockwise.pieces import Block
from planner.errors import PlanMismatchError
from planner.plan_file import Plan
from planner.prepare import prepare
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.whole_file import write_whole


class BlockwisePlan(BaseModel):
    """What each block of a step retains; what lies between them runs in eager mode.

    Attributes:
        format: of the file.
        budget_bytes: of one rank.
        predicted_peak_bytes: of one rank, with what it holds between steps.
        retained_all_peak_bytes: the same with everything retained.
        extra_time_fraction: what rematerialization adds to forward and backward.
        plans: the distinct plans, as JSON.
        blocks: name of a block -> number of its plan; blocks that retain everything are left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["blockwise-1"] = "blockwise-1"
    budget_bytes: int
    predicted_peak_bytes: int
    retained_all_peak_bytes: int
    extra_time_fraction: float
    plans: tuple[str, ...]
    blocks: Mapping[str, int]

    def of_blocks(self) -> dict[str, str]:
        """Name of a block -> its plan as JSON."""
        return {name: self.plans[number] for name, number in self.blocks.items()}

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: str | Path) -> BlockwisePlan:
        """Read it.

        Raises:
            PlanMismatchError: the file holds something else.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise PlanMismatchError(f"{path} is no plan of blocks. Plan again.") from error

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"plan: {len(self.blocks)} blocks rematerialize, by {len(self.plans)} plans, "
            f"+{self.extra_time_fraction:.1%} of forward and backward",
            f"predicted peak {format_bytes(self.predicted_peak_bytes)} of one rank, "
            f"{format_bytes(self.retained_all_peak_bytes)} with everything retained; "
            f"budget {format_bytes(self.budget_bytes)}",
        ]


def plan_of_option(block: Block, option: Option, **how: Any) -> Plan:
    """The plan that runs one option of a block.

    Args:
        block: as `planner.blockwise.pieces.pieces_of` gives it.
        option: of its kind, at the same micro-batch.
        how: hardware and the like, as for `planner.pipeline.prepare`.
    """
    prepared = prepare(block.module, (block.inputs, ()), loss=half_square, **how)
    problem = prepared.problem
    trace = simulate(problem, option.schedule)
    solution = Solution(
        status=Status.FEASIBLE,
        schedule=option.schedule,
        time_s=trace.time_s,
        bound_s=0.0,
        solve_s=0.0,
        solver="blockwise",
    )
    return prepared.answer(dataclasses.replace(problem, budget_bytes=trace.peak_bytes), solution)
