"""Whether every rank of a run was given the same plan: by its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from orchestrator.ranks import Ranks
from planner.errors import PlanMismatchError

_SHOWN = 12


def digest_of_plans(plan: str | None, block_plans: Mapping[str, str]) -> str:
    """SHA-256 over the plans that a rank runs.

    Args:
        plan: of the whole step, as JSON; None where there is none.
        block_plans: name of a block -> its plan, as JSON.
    """
    content = json.dumps([plan, dict(block_plans)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def check_same_plan(ranks: Ranks, *, plan: str | None, block_plans: Mapping[str, str], sent: str) -> None:
    """Compare what each rank has with what was sent, before any of them runs it; all ranks must call this.

    Args:
        ranks: of the run.
        plan: that this rank has.
        block_plans: that this rank has.
        sent: digest of what was planned.

    Raises:
        PlanMismatchError: on every rank, where one has another plan; names the first.
    """
    for rank, digest in enumerate(ranks.gather_objects(digest_of_plans(plan, block_plans))):
        if digest != sent:
            raise PlanMismatchError(
                f"rank {rank} has the plan {digest[:_SHOWN]}, but {sent[:_SHOWN]} was planned for the run; ranks "
                "with different plans would wait for one another for ever. Start the run again"
            )
