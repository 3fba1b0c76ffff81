"""The training loop of one rank: accumulate, measure the noise, step, log, validate, checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from cost_models.units import format_bytes
from orchestrator import randomness, sharding
from orchestrator.checkpoint import CheckpointError, CheckpointStore
from orchestrator.data import BatchLayout, MapDataset, SampleStream, check_batch, collate
from orchestrator.job import JobSpec
from orchestrator.metrics import Reporter, StepRecord, finite
from orchestrator.noise_measurement import NoiseMeasurement
from orchestrator.phases import Phase, phase_at
from orchestrator.ranks import Ranks
from orchestrator.techniques.schedules import WARMUP_FRACTION, num_warmup_steps
from orchestrator.validation import Validation, batch_loss
from planner.inputs.workload import BatchSpec
from planner.measure import Measurement, PeakMeter, live_tensors

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What changes from step to step beside tensors.

    Attributes:
        step: optimizer steps done.
        samples_seen: position in the stream of training samples.
        validation_before: mean validation loss before the first step.
        validation_after: mean validation loss when it was last measured.
        validated_step: and when that was.
    """

    step: int = 0
    samples_seen: int = 0
    validation_before: float | None = None
    validation_after: float | None = None
    validated_step: int = 0


@dataclass
class Trainer:
    """One rank's training. `run` is the loop; everything that it needs is made by worker.py.

    Attributes:
        job: what to do.
        ranks: who else takes part.
        step_module: returns the scalar loss; planned, and wrapped for data parallelism or sharded.
        plain_module: the same parameters without plan and wrapping. The step module where it is sharded.
        model: the part of it whose state is checkpointed.
        phases: its optimizer and schedule, or two of each, one after the other.
        validation: of the plain module.
        promise: predicted peak and budget of a rank, in bytes; None for plain training.
    """

    job: JobSpec
    ranks: Ranks
    step_module: nn.Module
    plain_module: nn.Module
    model: nn.Module
    phases: tuple[Phase, ...]
    train_set: MapDataset
    validation: Validation
    reporter: Reporter
    store: CheckpointStore
    promise: tuple[int, int] | None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        train = self.job.train
        self._enter(self.phases[0])
        self.layout = BatchLayout(self.job.micro_batch, train.accumulation, self.ranks.world_size)
        self.stream = SampleStream(len(self.train_set), seed=train.seed, shuffle=train.shuffle)
        self.in_buckets = self.ranks.world_size > 1 and not sharding.is_sharded(self.step_module)
        self.warned = self.warned_of_peak = False
        self.meter = PeakMeter(self.ranks.device)
        self.noise = NoiseMeasurement(
            self.step_module, self.layout, groups=[group["params"] for group in self.optimizer.param_groups]
        )
        self.num_warmup = num_warmup_steps(
            train.steps, float(train.schedule.settings.get("warmup_fraction", WARMUP_FRACTION))
        )
        self.parameters = [
            parameter for parameter in self.plain_module.parameters() if parameter.requires_grad
        ]

    def run(self) -> bool:
        """Train to the job's last step.

        Returns:
            False where the run was asked to stop before; a checkpoint of that step is then on disk.
        """
        train = self.job.train
        if self.progress.step == 0:
            self.progress.validation_before = self._validate()
        while self.progress.step < train.steps:
            stop = self._step()
            self._change_optimizer()
            step, last = self.progress.step, self.progress.step == train.steps
            if last or (train.validate_every and step % train.validate_every == 0):
                self.progress.validation_after, self.progress.validated_step = self._validate(), step
            if last or stop or (train.checkpoint_every and step % train.checkpoint_every == 0):
                self._save()
            if stop and not last:
                return False
        return True

    def _step(self) -> bool:
        """One optimizer step over the global batch; True where any rank was asked to stop."""
        started_s = time.perf_counter()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self._zero_gradients()
        measure_every = self.job.train.measure_memory_every
        is_measured = measure_every > 0 and self.progress.step % measure_every == 0
        with self._measured() if is_measured else contextlib.nullcontext(Measurement()) as measurement:
            loss = self._accumulate()
            norms = self.noise.local_norms()
            gradient_norm = self._clip()
            self.optimizer.step()
        self.schedule.step()
        self.progress.step += 1
        self.progress.samples_seen += self.layout.global_batch
        stop = float(self.reporter.stop_requested())
        rows = self.ranks.gather([loss, stop, float(measurement.peak_bytes), *norms])
        noise = self.noise.observe([row[3:] for row in rows])
        if self.progress.step == self.num_warmup:
            self.noise.forget()
        peaks = tuple(int(row[2]) for row in rows) if is_measured else ()
        if self.ranks.is_first:
            elapsed_s = time.perf_counter() - started_s
            record = StepRecord(
                step=self.progress.step,
                loss=sum(row[0] for row in rows) / len(rows),
                learning_rate=learning_rate,
                samples_seen=self.progress.samples_seen,
                samples_per_s=self.layout.global_batch / elapsed_s,
                gradient_norm=None if gradient_norm is None else finite(gradient_norm),
                measured_peak_bytes=max(peaks, default=None),
                measured_peak_bytes_by_rank=peaks,
                predicted_peak_bytes=None if self.promise is None else self.promise[0],
                noise_scale=finite(noise.value),
                noise_scale_interval=(noise.interval[0], finite(noise.interval[1])),
                noise_scale_reliable=noise.reliable,
                noise_scale_reason=noise.reason,
                noise_scale_by_group=tuple(finite(group.value) for group in self.noise.by_group()),
            )
            if not math.isfinite(record.loss) and not self.warned:
                logger.warning("the loss of step %d is not finite; lower the learning rate", record.step)
                self.warned = True
            self._warn_of(record.measured_peak_bytes)
            self.reporter.emit(record.to_event())
        return any(row[1] for row in rows)

    def _enter(self, phase: Phase) -> None:
        """Have the optimizer and schedule of a phase, new ones."""
        self.phase = phase
        self.optimizer = phase.make_optimizer(self.model)
        self.schedule = phase.make_schedule(self.optimizer)

    def _change_optimizer(self) -> None:
        """After the last step of a phase, free its optimizer's state and go on with the next one's."""
        phase = phase_at(self.phases, self.progress.step)
        if phase is self.phase:
            return
        self.optimizer.state.clear()
        self._enter(phase)
        if self.ranks.is_first:
            rate = float(self.optimizer.param_groups[0]["lr"])
            event = {"event": "optimizer", "step": self.progress.step, "name": phase.name}
            self.reporter.emit({**event, "learning_rate": rate})

    def _warn_of(self, peak_bytes: int | None) -> None:
        """Say once that a step took more than its plan's budget."""
        if self.promise is None or peak_bytes is None or self.warned_of_peak:
            return
        budget_bytes = self.promise[1]
        excess = peak_bytes - budget_bytes
        if excess > 0:
            self.warned_of_peak = True
            logger.warning(
                "step %d took %s, %s more than the budget; plan with a budget of %s",
                self.progress.step,
                format_bytes(peak_bytes),
                format_bytes(excess),
                format_bytes(budget_bytes - excess),
            )

    def _zero_gradients(self) -> None:
        """Free the gradients, or keep their memory where micro-batches will add to data-parallel buckets."""
        in_buckets = self.in_buckets and self.layout.accumulation > 1
        self.optimizer.zero_grad(set_to_none=not in_buckets)

    @contextlib.contextmanager
    def _measured(self) -> Iterator[Measurement]:
        """Measure the peak of this rank from the first batch to the end of the optimizer's step."""
        # Data-parallel buckets exist before the gradients that will be views of them.
        new = self.in_buckets and all(p.grad is None for p in self.parameters)
        bucket_bytes = sum(p.nbytes for p in self.parameters) if new else 0
        live = live_tensors(self.plain_module, self.optimizer)
        with self.meter.step(live=live, extra_bytes=bucket_bytes) as measurement:
            yield measurement

    def _accumulate(self) -> float:
        """Gradients of the mean loss over this rank's micro-batches; returns that mean."""
        total = 0.0
        for micro in range(self.layout.accumulation):
            inputs, targets = self._micro_batch(micro)
            with self._synchronized(micro == self.layout.accumulation - 1):
                loss = batch_loss(self.job, self.step_module, inputs, targets)
                (loss / self.layout.accumulation if self.layout.accumulation > 1 else loss).backward()
            total += loss.item()
            del inputs, targets, loss  # before the next micro-batch is loaded
        return total / self.layout.accumulation

    @contextlib.contextmanager
    def _synchronized(self, last: bool) -> Iterator[None]:
        """Reduce gradients over the ranks in the last micro-batch only."""
        with contextlib.nullcontext() if last else sharding.without_reduction(self.step_module):
            yield

    def _micro_batch(self, micro: int) -> tuple[Any, Any]:
        start = self.layout.start(self.progress.samples_seen, micro=micro, rank=self.ranks.rank)
        indices = self.stream.indices(start, self.layout.micro_batch)
        inputs, targets = collate(self.train_set, indices, device=self.ranks.device)
        assert isinstance(self.job.batch, BatchSpec)  # JobSpec.micro_batch refuses the other kind
        check_batch(inputs, self.job.batch.inputs, what="the input")
        if self.job.batch.targets is not None:
            check_batch(targets, self.job.batch.targets, what="the target")
        return inputs, targets

    def _clip(self) -> float | None:
        if self.job.train.clip_norm is None:
            return None
        norm = nn.utils.clip_grad_norm_(self.parameters, self.job.train.clip_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _validate(self) -> float:
        """The validation loss, which is reported."""
        loss = self.validation.loss()
        if self.ranks.is_first:
            self.reporter.emit({"event": "validation", "step": self.progress.step, "loss": loss})
        return loss

    def evaluate_average(self, path: Path) -> None:
        """Validate with the averaged weights, write them to `path` and report it; the run's own weights stay."""
        loss = self.validation.average_loss(self.optimizer, path)
        if self.ranks.is_first:
            self.reporter.emit(
                {"event": "average", "step": self.progress.step, "loss": loss, "path": str(path)}
            )

    def _save(self) -> None:
        """Write the state of the run; every rank takes part, rank 0 writes."""
        states = self.ranks.gather_objects(randomness.capture_state(self.ranks.device))
        path, state = None, self.state(randomness_by_rank=states)
        if self.ranks.is_first:
            path = self.store.save(state, step=self.progress.step)
            self.reporter.emit({"event": "checkpoint", "step": self.progress.step, "path": str(path)})
        self.reporter.checkpoint_saved(path, step=self.progress.step)

    def state(self, *, randomness_by_rank: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything that the rest of the run depends on; sharded tensors are whole, and on rank 0 alone."""
        keep = self.ranks.is_first
        return {
            "model": sharding.whole(self.model.state_dict(), keep=keep),
            "optimizer": sharding.whole(self.optimizer.state_dict(), keep=keep),
            "schedule": self.schedule.state_dict(),
            "noise": self.noise.state_dict(),
            "progress": vars(self.progress).copy(),
            "randomness": randomness_by_rank,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, on every rank."""
        self.progress = Progress(**state["progress"])
        phase = phase_at(self.phases, self.progress.step)
        if phase is not self.phase:
            self._enter(phase)
        self.model.load_state_dict(sharding.model_state_like(state["model"], self.model.state_dict()))
        self.optimizer.load_state_dict(sharding.optimizer_state_like(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(state["schedule"])
        self.noise.load_state_dict(state["noise"])
        saved = state["randomness"]
        if len(saved) != self.ranks.world_size:
            raise CheckpointError(
                f"the checkpoint was written by {len(saved)} ranks, but {self.ranks.world_size} are to continue; "
                f"set train.workers to {len(saved)}"
            )
        randomness.restore_state(saved[self.ranks.rank], self.ranks.device)
