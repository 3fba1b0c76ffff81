"""A plan for one block of a model, whose outputs are no loss: their gradients come from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from planner.lower.trace import pytree
from planner.pipeline import plan
from planner.plan_file import Plan


def plan_block(block: nn.Module, inputs: Any, *, budget: str, **options: Any) -> Plan:
    """Decide what one block retains and what it rematerializes.

    In place of the rest of the model stands half the squared norm of the outputs, whose gradient is as dense as
    they are; what the rest really gives is used when the plan runs. The budget is of the block alone: its
    parameters, inputs, outputs and their gradients. Alike blocks can share a plan, apart from the first where its
    inputs need no gradient.

    Args:
        block: in training mode.
        inputs: of one call; those that come from trained parts must require a gradient, as they will.
        budget: as for `planner.plan`.
        **options: other arguments of `planner.plan`, but the loss.

    Returns:
        A plan to `apply` to the block, before the model is sharded or wrapped.

    Raises:
        CaptureError, InfeasibleError, SolverError, ValueError: as for `planner.plan`.
    """
    return plan(block, (inputs, ()), loss=half_square, budget=budget, **options)


def half_square(outputs: Any, _: Any) -> torch.Tensor:
    """Half the squared norm of all outputs that have a gradient."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return torch.stack([leaf.square().sum() / 2 for leaf in leaves if leaf.requires_grad]).sum()
