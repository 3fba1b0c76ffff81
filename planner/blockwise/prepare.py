"""A step's blocks and the rest, captured and priced at two sizes of the batch, as a profile at any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cost_models.roofline import CostModel
from planner.block_plan import half_square
from planner.blockwise.options import alone, option_of, options_of, pareto
from planner.blockwise.pieces import pieces_of
from planner.blockwise.profile import Profile, rest_of
from planner.capture import Captured, capture
from planner.capturing.workspace import with_workspaces
from planner.costed import priced
from planner.errors import CaptureError
from planner.graph import Graph
from planner.problem import Problem, StaticMemory
from planner.step import StepModule
from planner.tradeoff.rebatched import scaling

MakeStep = Callable[[int], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class _Captured:
    """Graphs of one size: of the rest, and of each kind of block; `layers` are the blocks' names in the rest."""

    order: tuple[str, ...]
    layers: tuple[str, ...]
    kinds: tuple[int, ...]
    rest: Graph
    blocks: tuple[Graph, ...]
    shared_bytes: int


class Profiles:
    """The profile of a step at any micro-batch, from captures at two.

    Args:
        make: gives the module that returns the loss and its inputs, at a micro-batch; without memory.
        blocks: names of the blocks in it.
        sizes: of the two captures.
        cost_model: prices operations.
        workspaces: count what kernels allocate on the way, tried on this device.
        each_size: capture every size that is asked for, so that measured times of its operations are found.
        time_limit_s: of each search for a block's options.

    Raises:
        CaptureError: the step cannot be taken apart, or is another one at the second size.
    """

    def __init__(
        self,
        make: MakeStep,
        *,
        blocks: tuple[str, ...],
        sizes: tuple[int, int],
        cost_model: CostModel,
        workspaces: bool = False,
        each_size: bool = False,
        time_limit_s: float = 2.0,
    ) -> None:
        first, second = (_captured(*make(size), blocks=blocks, workspaces=workspaces) for size in sizes)
        if (first.order, first.kinds) != (second.order, second.kinds):
            raise CaptureError("the blocks of the step differ with its batch; plan the whole step in one")
        self.order, self._layers, self._kinds = first.order, first.layers, first.kinds
        self._make, self._names, self._each_size = make, blocks, each_size
        self._workspaces = workspaces
        self._cost_model = cost_model
        self._sizes, self._shared = sizes, (first.shared_bytes, second.shared_bytes)
        self._rest = _scaled(first.rest, second.rest, sizes, cost_model)
        self._blocks = tuple(
            _scaled(a, b, sizes, cost_model) for a, b in zip(first.blocks, second.blocks, strict=True)
        )
        self._schedules = tuple(
            [option.schedule for option in options_of(alone(at(sizes[1])), time_limit_s=time_limit_s)]
            for at in self._blocks
        )

    def profile(self, micro_batch: int) -> Profile:
        """The step at a size; blocks have the schedules of one size, with the seconds and bytes of this one."""
        if self._each_size:
            captured = _captured(*self._make(micro_batch), blocks=self._names, workspaces=self._workspaces)
            rest = priced(captured.rest, self._cost_model)
            blocks = [
                Problem(priced(graph, self._cost_model), 0, StaticMemory()) for graph in captured.blocks
            ]
        else:
            rest = self._rest(micro_batch).costed
            blocks = [at(micro_batch) for at in self._blocks]
        options = tuple(
            pareto([option_of(alone(problem), schedule) for schedule in schedules])
            for problem, schedules in zip(blocks, self._schedules, strict=True)
        )
        return Profile(rest_of(rest, self._layers), self._kinds, options)

    @property
    def num_nodes(self) -> int:
        """Nodes of the whole step."""
        size = self._sizes[0]
        of_blocks = [len(at(size).costed.graph.nodes) for at in self._blocks]
        return len(self._rest(size).costed.graph.nodes) + sum(of_blocks[kind] for kind in self._kinds)

    def shared_bytes(self, micro_batch: int) -> int:
        """Of masks and the like that blocks are given."""
        (low, high), (a, b) = self._sizes, self._shared
        return a + (b - a) * (micro_batch - low) // (high - low)


def _captured(step: nn.Module, batch: Any, *, blocks: tuple[str, ...], workspaces: bool) -> _Captured:
    pieces = pieces_of(step, batch, blocks=blocks)
    kind_of = {name: kind for kind, block in enumerate(pieces.blocks) for name in block.names}
    return _Captured(
        order=pieces.order,
        # Layers are named as in the user's model, without the module that puts the loss inside.
        layers=tuple(
            name.removeprefix("model.") if isinstance(step, StepModule) else name for name in pieces.order
        ),
        kinds=tuple(kind_of[name] for name in pieces.order),
        rest=_graph(capture(pieces.rest, batch), workspaces),
        blocks=tuple(
            _graph(capture(block.module, (block.inputs, ()), loss=half_square), workspaces)
            for block in pieces.blocks
        ),
        shared_bytes=pieces.shared_bytes,
    )


def _graph(captured: Captured, workspaces: bool) -> Graph:
    return with_workspaces(captured.graph, captured.calls)[0] if workspaces else captured.graph


def _scaled(
    first: Graph, second: Graph, sizes: tuple[int, int], cost_model: CostModel
) -> Callable[[int], Problem]:
    one, two = (Problem(priced(graph, cost_model), 0, StaticMemory()) for graph in (first, second))
    at = scaling(one, two, sizes=sizes, cost_model=cost_model)
    if at is None:
        raise CaptureError("the step has other operations with another batch; plan the whole step in one")
    return at
