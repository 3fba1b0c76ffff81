"""The planner: what a training step retains and what it rematerializes inside a memory budget.

Importing this package loads neither torch nor ray; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.errors import CaptureError, CompilerError, InfeasibleError, PlanMismatchError
    from planner.lower.out_of_memory import StepOutOfMemoryError
    from planner.pipeline import apply, plan
    from planner.plan_file import Plan
    from planner.step import StepModule

__all__ = [
    "CaptureError",
    "CompilerError",
    "InfeasibleError",
    "Plan",
    "PlanMismatchError",
    "StepModule",
    "StepOutOfMemoryError",
    "apply",
    "plan",
]

_HOME = {
    "CaptureError": "planner.errors",
    "CompilerError": "planner.errors",
    "InfeasibleError": "planner.errors",
    "Plan": "planner.plan_file",
    "PlanMismatchError": "planner.errors",
    "StepModule": "planner.step",
    "StepOutOfMemoryError": "planner.lower.out_of_memory",
    "apply": "planner.pipeline",
    "plan": "planner.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'planner' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
