"""Executors: what turns each half of a partitioned step into a function that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from planner.lower.partition import PART_OF

# A function of one list of tensors, which it empties as it reads.
Boxed = Callable[[list[Any]], Any]


class Executor(Protocol):
    """Makes the function of one half of the step."""

    def __call__(self, half: fx.GraphModule, example_inputs: Any) -> Boxed:
        """The half as a function of one list.

        Args:
            half: forward or backward of `planner.lower.partition.partition`.
            example_inputs: fake tensors of its inputs.
        """
        ...


def aten(half: fx.GraphModule, example_inputs: Any) -> Boxed:
    """Operation by operation, as it is written; every name is dropped after its last use, arguments included."""
    return marked_boxed(half.forward)


def marked_boxed(function: Callable[[list[Any]], Any]) -> Boxed:
    """A function of one list, known as such to AOTAutograd."""

    def call(arguments: list[Any]) -> Any:
        return function(arguments)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


class Timed:
    """Runs operation by operation and keeps the seconds of each, by the name of its node.

    On the CPU they are processor seconds of all threads during the call, which other programs on the machine do not
    add to; on CUDA those between two events.

    Attributes:
        seconds: name of a call -> seconds of each run.
        part_of: name of a call -> name of the node of the plan's graph that it runs for, where that is another.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.part_of: dict[str, str] = {}
        self._events: list[tuple[str, Any, Any]] = []

    def __call__(self, half: fx.GraphModule, example_inputs: Any) -> Boxed:
        """The half, timed."""
        return marked_boxed(_TimedHalf(half, self).run_boxed)

    def collect(self) -> None:
        """Wait for the device and keep what its events say."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self.add(name, start.elapsed_time(end) / 1e3)
        self._events.clear()

    def add(self, name: str, seconds: float) -> None:
        """Keep one time."""
        self.seconds.setdefault(name, []).append(seconds)

    def expect(self, name: str, start: Any, end: Any) -> None:
        """Keep two events until `collect`."""
        self._events.append((name, start, end))


class _TimedHalf(fx.Interpreter):
    """One half, interpreted, each of its calls timed."""

    def __init__(self, half: fx.GraphModule, timed: Timed) -> None:
        super().__init__(half)
        self.timed = timed
        self._name = ""
        vals = pytree.tree_leaves([node.meta.get("val") for node in half.graph.nodes])
        self._on_cuda = any(isinstance(v, torch.Tensor) and v.device.type == "cuda" for v in vals)

    def run_boxed(self, arguments: list[Any]) -> Any:
        """Run with a list of arguments, emptied first."""
        given = list(arguments)
        arguments.clear()
        return self.run(*given)

    def run_node(self, n: fx.Node) -> Any:
        """Remember whose call is next."""
        self._name = n.name
        if PART_OF in n.meta:
            self.timed.part_of[n.name] = n.meta[PART_OF]
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Time one call."""
        name = self._name
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = target(*args, **kwargs)
            end.record()
            self.timed.expect(name, start, end)
            return out
        begin = time.process_time()
        out = target(*args, **kwargs)
        self.timed.add(name, time.process_time() - begin)
        return out
