"""What an operation takes in a step beyond its own time: torch's dispatch, autograd, views, what calls it."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import nn

from planner.calibrating.operations import Operation, operations_of
from planner.capture import Captured, capture
from planner.checking.real_step import RealStep, Running
from planner.pipeline import apply
from planner.prepare import prepare
from planner.prepared import plan_within
from planner.solvers.retain_all import RetainAll

OVERHEAD = "overhead"
_STEPS = 5


class _Block(nn.Module):
    """Normalization, a product, and an addition: a layer so small that little of its time is arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 16) -> (batch, 16)."""
        return x + self.narrow(self.act(self.wide(self.norm(x))))


def _of_squares(outputs: torch.Tensor, targets: None) -> torch.Tensor:
    return outputs.square().mean()


class Overhead:
    """A step of many tiny operations, planned with everything retained, and what its operations take alone.

    Args:
        device: that computes.
        layers: of the step's network.
    """

    def __init__(self, device: torch.device, *, layers: int = 12) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(*(_Block() for _ in range(layers))).to(device)
            inputs = torch.randn(8, 16).to(device)
        prepared = prepare(model, (inputs, None), loss=_of_squares)
        plan = plan_within(
            prepared, budget="none", time_limit_s=1.0, gap=0.0, solver=RetainAll.name, free_order=False
        )
        self.captured: Captured = capture(model, (inputs, None), loss=_of_squares)
        # So few parameters stay in the cache from one step to the next.
        self.operations: Mapping[str, Operation] = {
            line: dataclasses.replace(operation, distance="near")
            for line, operation in operations_of([self.captured]).items()
        }
        step = RealStep(inputs, None, _of_squares)
        self._running: Running = step.on(apply(copy.deepcopy(model), plan))
        self._running.timed(seed=0)

    def steps_s(self) -> list[float]:
        """Seconds of some steps."""
        return [self._running.timed(seed=turn) for turn in range(_STEPS)]

    def a_call_s(self, alone_s: Callable[[Operation], float], before_each: Callable[[str], None]) -> float:
        """Seconds of each call, of a view too, that the operations' times alone do not hold.

        Args:
            alone_s: seconds of one operation alone, measured now.
            before_each: called with the line of an operation, or `OVERHEAD`, before it runs.
        """
        known = {}
        for line, operation in self.operations.items():
            before_each(line)
            known[line] = alone_s(operation)
        nodes = self.captured.graph.nodes
        works = [work for node in nodes for work in (node.work, *node.then)]
        num_calls = len(works) + sum(node.num_views for node in nodes)
        alone = sum(known.get(work.operation, 0.0) for work in works)
        before_each(OVERHEAD)
        step_s = statistics.median(self.steps_s())
        return max(0.0, step_s - alone) / num_calls
