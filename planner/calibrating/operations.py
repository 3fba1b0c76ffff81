"""The distinct operations of captured steps, each with what is needed to run it alone on this device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.node import map_arg

from cost_models.work import Work
from planner.calibrating.timer import Distance
from planner.capture import Captured
from planner.capturing.in_place import in_place_of
from planner.graph import Graph, Node, Phase
from planner.lower.recurrent import LSTM_LAYER, lstm_layer

# Whose kernels compute from the values of shapes and numbers alone; operators of others may do anything.
_NAMESPACES = ("aten", "prims", "lowtide")
# Kernels that read an argument as packed state: what is made up for it may end the process.
_PACKED = ("rnn_layer_backward", "_rnn", "miopen", "_embedding_bag", "ctc_loss")
# Elements of the numbers that arguments are filled with, again and again.
_POOL = 1 << 16


class RunsAlone(Protocol):
    """What can be timed by itself: an operation of a step, or the step of an optimizer."""

    @property
    def line(self) -> str:
        """`Work.operation`, by which its time is found again."""
        ...

    @property
    def work(self) -> Work:
        """Its demand."""
        ...

    @property
    def distance(self) -> Distance:
        """Where what it reads was made."""
        ...

    def ready(self, device: torch.device) -> Callable[[], Any]:
        """The operation with real arguments, to be called any number of times; RuntimeError where that fails."""
        ...


@dataclass(frozen=True)
class Operation:
    """One operation with its shapes.

    Attributes:
        line: `Work.operation`, by which its time is found again.
        work: its demand.
        call: of a trace, with fake tensors in its metadata.
        runs_in_place: it writes over an argument.
        distance: where what it reads was made: parameters in the step before, others in this one.
    """

    line: str
    work: Work
    call: fx.Node
    runs_in_place: bool
    distance: Distance = "near"

    def ready(self, device: torch.device) -> Callable[[], Any]:
        """The operation with arguments in the memory of a device, to be called any number of times.

        Indices are valid ones; all other numbers lie between 0 and 1.

        Raises:
            RuntimeError: there is not enough memory.
        """
        target = str(self.call.target)

        def real(node: fx.Node) -> Any:
            return _real(node.meta.get("val"), device=device, high=_high(target, self.call, node))

        args, kwargs = map_arg((self.call.args, self.call.kwargs), real)
        function: Any = lstm_layer if self.call.target is LSTM_LAYER else self.call.target
        if self.runs_in_place:
            function = in_place_of(self.call.target)
            assert function is not None
            val = self.call.meta["val"]
            if isinstance(args[0], torch.Tensor) and args[0].shape != val.shape:
                args = (args[1], args[0], *args[2:])
        return lambda: function(*args, **kwargs)


def operations_of(captured: Iterable[Captured]) -> dict[str, Operation]:
    """The distinct operations of some steps that can be run alone, by their line.

    Copies that end forward, kernels of inductor, operators of other libraries and kernels that read packed state
    are left out.
    """
    found: dict[str, Operation] = {}
    num_runs: Counter[str] = Counter()
    num_far: Counter[str] = Counter()
    for step in captured:
        for node, calls in zip(step.graph.nodes, step.calls, strict=True):
            for at, (work, call) in enumerate(zip((node.work, *node.then), calls, strict=False)):
                if call is None or not work.operation or work.kind == "view":
                    continue
                num_runs[work.operation] += 1
                num_far[work.operation] += at == 0 and _reads_forward(step.graph, node)
                if work.operation in found:
                    continue
                target = str(call.target)
                if target.partition(".")[0] in _NAMESPACES and not any(word in target for word in _PACKED):
                    found[work.operation] = Operation(
                        work.operation,
                        work,
                        call,
                        runs_in_place=at > 0,
                        distance="cold" if _reads_placeholders(call) else "near",
                    )
    for line, operation in found.items():
        if operation.distance == "near" and 2 * num_far[line] > num_runs[line]:
            found[line] = replace(operation, distance="far")
    return found


def _reads_forward(graph: Graph, node: Node) -> bool:
    """Whether it is a backward operation that reads what forward has made."""
    return node.phase is Phase.BACKWARD and any(
        graph.nodes[graph.values[v].node].phase is Phase.FORWARD for v in node.inputs
    )


def _reads_placeholders(call: fx.Node) -> bool:
    """Whether an argument is an input of the step, or a view of one."""
    for node in call.all_input_nodes:
        while node.op == "call_function" and getattr(node.target, "is_view", False):
            node = node.all_input_nodes[0]
        if node.op == "placeholder":
            return True
    return False


def _high(target: str, call: fx.Node, node: fx.Node) -> int:
    """Exclusive bound of the indices that an argument may hold; 1 where only zero is safe."""
    if target.startswith("aten.embedding.") and node is call.args[1]:
        return call.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    if target.startswith("aten.embedding_dense_backward") and node is call.args[1]:
        return call.args[2] if isinstance(call.args[2], int) else 1
    return 1


def _real(val: Any, *, device: torch.device, high: int) -> Any:
    """A real tensor with the layout of a fake one."""
    if isinstance(val, list | tuple):
        return type(val)(_real(item, device=device, high=high) for item in val)
    if not isinstance(val, torch.Tensor):
        return val
    elements = 1 + sum((size - 1) * stride for size, stride in zip(val.shape, val.stride(), strict=True))
    flat = torch.empty(elements if val.numel() else 0, dtype=val.dtype, device=device)
    if val.dtype.is_floating_point or val.is_complex():
        numbers = torch.rand(_POOL, device=device).to(val.dtype)
    elif val.dtype == torch.bool:
        numbers = torch.rand(_POOL, device=device) < 0.9
    else:
        numbers = torch.randint(high, (_POOL,), device=device).to(val.dtype)
    for begin in range(0, flat.numel(), _POOL):
        part = flat[begin : begin + _POOL]
        part.copy_(numbers[: part.numel()])
    return flat.as_strided(tuple(val.shape), val.stride())
