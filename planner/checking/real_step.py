"""One real training step of a module, and everything that it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.lower.trace import pytree
from planner.measure import PeakMeter, live_tensors
from planner.step import call_model


@dataclass(frozen=True)
class RealStep:
    """What is run: a batch of real tensors, a loss, an optimizer.

    Attributes:
        inputs: of the module: a tensor, a sequence of positional ones, or a mapping of named ones.
        targets: of the loss.
        loss: ``loss(outputs, targets)`` -> scalar; None if the module returns its loss.
        optimizer: builds the optimizer of a module; None runs forward and backward alone.
        accumulation: micro-batches (the same one again) in one step of the optimizer.
    """

    inputs: Any
    targets: Any = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    accumulation: int = 1

    def on(self, module: nn.Module) -> Running:
        """The step on a module, which it changes as training does."""
        optimizer = None if self.optimizer is None else self.optimizer(module)
        return Running(self, module, optimizer)


@dataclass(frozen=True)
class Left:
    """What a step leaves behind.

    Attributes:
        outputs: tensors that the module returned, by their path.
        loss: the scalar.
        gradients: of every parameter, by name; None where there is none.
        buffers: of the module, by name.
        random_state: of the device's generator.
        peak_bytes: most bytes that the allocator had given out; 0 where it was not measured.
    """

    outputs: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    random_state: torch.Tensor
    peak_bytes: int


@dataclass
class Running:
    """A step on one module, ready to be run any number of times.

    Attributes:
        step: what is run.
        module: eager or planned.
        optimizer: of the module, or None.
    """

    step: RealStep
    module: nn.Module
    optimizer: torch.optim.Optimizer | None

    @property
    def device(self) -> torch.device:
        """Where the module's first parameter lies."""
        return next(self.module.parameters()).device

    def measured(self, *, seed: int) -> Left:
        """Run it once and measure its peak; everything that it leaves is copied."""
        self._empty_gradients()
        outputs: list[Any] = []
        torch.manual_seed(seed)
        live = live_tensors(self.module, self.optimizer, (self.step.inputs, self.step.targets))
        with PeakMeter(self.device).step(live=live) as measured:
            loss = self._run(outputs)
        random_state = (
            torch.get_rng_state()
            if self.device.type == "cpu"
            else torch.get_device_module(self.device).get_rng_state()
        )
        return Left(
            outputs={path: leaf.detach().clone() for path, leaf in _tensors(outputs[0])},
            loss=loss.detach().clone(),
            gradients={name: p.grad for name, p in self.module.named_parameters()},
            buffers={name: b.detach().clone() for name, b in self.module.named_buffers()},
            random_state=random_state,
            peak_bytes=measured.peak_bytes,
        )

    def timed(self, *, seed: int) -> float:
        """Run it once; processor seconds of all threads (CPU), or seconds on the device (CUDA)."""
        self._empty_gradients()
        torch.manual_seed(seed)
        if self.device.type != "cuda":
            begin = time.process_time()
            self._run([])
            return time.process_time() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._run([])
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3

    def _run(self, kept: list[Any]) -> torch.Tensor:
        step = self.step
        value = None
        for _ in range(step.accumulation):
            del value, kept[:]
            outputs = call_model(self.module, step.inputs)
            value = loss_of(outputs) if step.loss is None else step.loss(outputs, step.targets)
            value.backward()
            kept.append(outputs)
            del outputs
        assert value is not None
        if self.optimizer is not None:
            self.optimizer.step()
        return value

    def _empty_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None


def loss_of(outputs: Any) -> torch.Tensor:
    """The loss among the outputs of a module that returns it: the first tensor that has a gradient."""
    return next(
        leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    )


def _tensors(outputs: Any) -> list[tuple[str, torch.Tensor]]:
    leaves = pytree.tree_flatten_with_path(outputs)[0]
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]


def interleaved(runs: dict[str, Running], *, rounds: int) -> dict[str, float]:
    """Median seconds of each of several steps that take turns; the first round of all is not counted.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"timing needs at least one round, got {rounds}. Ask for 3 or more.")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = run.timed(seed=turn)
            if turn:
                times[name].append(taken)
    return {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
