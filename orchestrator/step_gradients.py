"""The gradients of one step on one rank: read its micro-batches, accumulate, reduce, clip, measure the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from orchestrator import randomness, sharding
from orchestrator.data import BatchLayout, MapDataset, SampleStream, check_batch, collate
from orchestrator.job import JobSpec
from orchestrator.ranks import Ranks
from orchestrator.validation import batch_loss
from planner.inputs.workload import BatchSpec
from planner.measure import Measurement, PeakMeter, live_tensors


class StepGradients:
    """Makes the gradients of a rank's steps.

    Args:
        job: whose loss, batch and clipping.
        ranks: who else takes part.
        step_module: returns the scalar loss; planned, and wrapped for data parallelism or sharded.
        plain_module: the same parameters without plan and wrapping.
        train_set: that micro-batches are read from.
    """

    def __init__(
        self,
        *,
        job: JobSpec,
        ranks: Ranks,
        step_module: nn.Module,
        plain_module: nn.Module,
        train_set: MapDataset,
    ) -> None:
        self._job, self._ranks, self._train_set = job, ranks, train_set
        self._step_module, self._plain_module = step_module, plain_module
        self._parameters = [parameter for parameter in plain_module.parameters() if parameter.requires_grad]
        self._stream = SampleStream(len(train_set), seed=job.train.seed, shuffle=job.train.shuffle)
        self._in_buckets = ranks.world_size > 1 and not sharding.is_sharded(step_module)
        self._meter = PeakMeter(ranks.device)

    def prime(self) -> None:
        """Have data-parallel gradients lie in their buckets before the first step that is to keep to its plan.

        Where micro-batches accumulate, the first backward that is not reduced would make gradients beside the empty
        buckets. So one is reduced now, before the optimizer has any state, and its result is dropped; what it has
        changed, random numbers and buffers, is put back. Without accumulation there is no such backward.
        """
        if not self._in_buckets or self._job.planned_accumulation == 1:
            return
        drawn = randomness.capture_state(self._ranks.device)
        buffers = [buffer.clone() for buffer in self._plain_module.buffers()]
        inputs, targets = self._read(0, self._job.micro_batch)
        batch_loss(self._job, self._step_module, inputs, targets).backward()
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            for buffer, before in zip(self._plain_module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        randomness.restore_state(drawn, self._ranks.device)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Free the gradients, or keep their memory where micro-batches will add to data-parallel buckets."""
        in_buckets = self._in_buckets and self._job.planned_accumulation > 1
        optimizer.zero_grad(set_to_none=not in_buckets)

    @contextlib.contextmanager
    def measured(self, optimizer: torch.optim.Optimizer) -> Iterator[Measurement]:
        """Measure the peak of this rank from the first batch to the end of the optimizer's step."""
        # Data-parallel buckets exist before the gradients that will be views of them.
        new = self._in_buckets and all(p.grad is None for p in self._parameters)
        bucket_bytes = sum(p.nbytes for p in self._parameters) if new else 0
        live = live_tensors(self._plain_module, optimizer)
        with self._meter.step(live=live, extra_bytes=bucket_bytes) as measurement:
            yield measurement

    def accumulate(self, layout: BatchLayout, *, position: int) -> float:
        """Gradients of the mean loss over this rank's micro-batches; returns that mean.

        Args:
            layout: of the step's batch.
            position: in the stream, of the step's first sample.
        """
        total = 0.0
        count, divisor = layout.num_micro_batches(self._ranks.rank), layout.mean_micro_batches
        for micro in range(count):
            start = layout.start(position, micro=micro, rank=self._ranks.rank)
            inputs, targets = self._read(start, layout.micro_batch)
            with self._synchronized(last=micro == count - 1):
                loss = batch_loss(self._job, self._step_module, inputs, targets)
                (loss / divisor if divisor != 1 else loss).backward()
            total += loss.item()
            del inputs, targets, loss  # before the next micro-batch is loaded
        return total / divisor

    @contextlib.contextmanager
    def _synchronized(self, *, last: bool) -> Iterator[None]:
        """Reduce gradients over the ranks in the last micro-batch only."""
        with contextlib.nullcontext() if last else sharding.without_reduction(self._step_module):
            yield

    def _read(self, start: int, count: int) -> tuple[Any, Any]:
        """The samples of some positions, on this rank's device, as the batch was planned."""
        indices = self._stream.indices(start, count)
        inputs, targets = collate(self._train_set, indices, device=self._ranks.device)
        assert isinstance(self._job.batch, BatchSpec)  # JobSpec.micro_batch refuses the other kind
        check_batch(inputs, self._job.batch.inputs, what="the input")
        if self._job.batch.targets is not None:
            check_batch(targets, self._job.batch.targets, what="the target")
        return inputs, targets

    def clip(self) -> float | None:
        """Clip the gradient to the job's largest norm; the norm before, None where nothing is clipped."""
        if self._job.train.clip_norm is None:
            return None
        norm = nn.utils.clip_grad_norm_(self._parameters, self._job.train.clip_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
