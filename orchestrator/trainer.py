"""The training loop of one rank: gradients, noise, step, log, validate, checkpoint."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator import randomness, sharding
from orchestrator.batch_size.controller import controller_of
from orchestrator.batch_size.noise_estimate import NoiseScale
from orchestrator.checkpoint import CheckpointError
from orchestrator.data import BatchLayout, MapDataset
from orchestrator.job import JobSpec
from orchestrator.metrics import Reporter, StepRecord, finite
from orchestrator.noise_measurement import NoiseMeasurement
from orchestrator.nonfinite import Fault, NotFiniteGuard, all_finite, bad_ranks
from orchestrator.peak_watch import PeakWatch
from orchestrator.phases import Phase, phase_at
from orchestrator.ranks import Ranks
from orchestrator.saving import Saving
from orchestrator.step_gradients import StepGradients
from orchestrator.techniques.schedules import WARMUP_FRACTION, num_warmup_steps
from orchestrator.training_progress import Progress
from orchestrator.validation import Validation
from planner.measure import Measurement

logger = logging.getLogger(__name__)


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
    saving: Saving
    promise: tuple[int, int] | None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        train = self.job.train
        self._enter(self.phases[0])
        self.controller = controller_of(self.job, num_samples=len(self.train_set))
        self.num_samples = train.steps * self.job.base_batch
        self.layout = self._next_layout()
        self.gradients = StepGradients(
            job=self.job,
            ranks=self.ranks,
            step_module=self.step_module,
            plain_module=self.plain_module,
            train_set=self.train_set,
        )
        self.gradients.prime()
        self.warned, self.peak_watch = False, PeakWatch(self.promise)
        self.not_finite = NotFiniteGuard(train.on_nan, most=train.max_failures)
        self.noise = NoiseMeasurement(
            self.step_module,
            self.layout,
            groups=[group["params"] for group in self.optimizer.param_groups],
            every=train.measure_noise_every,
            is_followed=self.controller is not None,
        )
        self.num_warmup = num_warmup_steps(
            train.steps, float(train.schedule.settings.get("warmup_fraction", WARMUP_FRACTION))
        )

    def run(self) -> bool:
        """Train to the job's last step.

        Returns:
            False where the run was asked to stop before; a checkpoint of that step is then on disk.
        """
        train = self.job.train
        if self.progress.step == 0:
            self.progress.validation_before = self._validate()
            if train.on_nan == "rollback":  # which may be asked for before the first checkpoint is due
                self._save()
        self._set_rates()
        while self.progress.samples_seen < self.num_samples:
            before = self.progress.step
            stop = self._step()
            self._change_optimizer()
            self._set_rates()
            if self.progress.step <= before and not stop:  # a rollback, to a step that is validated and saved
                continue
            step, last = self.progress.step, self.progress.samples_seen >= self.num_samples
            if last or (train.validate_every and step % train.validate_every == 0):
                self.progress.validation_after, self.progress.validated_step = self._validate(), step
            if last or stop or self._is_saved(step):
                self._save()
            if stop and not last:
                self.saving.settle(is_last=True)
                return False
        self.saving.settle(is_last=True)
        return True

    def _step(self) -> bool:
        """One optimizer step over the global batch; True where any rank was asked to stop."""
        started_s = time.perf_counter()
        self.layout = self._next_layout()
        self.noise.begin_step(self.layout)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.gradients.clear(self.optimizer)
        measure_every = self.job.train.measure_memory_every
        is_measured = measure_every > 0 and self.progress.step % measure_every == 0
        peak = self.gradients.measured(self.optimizer) if is_measured else nullcontext(Measurement())
        with peak as measurement:
            loss = self.gradients.accumulate(self.layout, position=self.progress.position)
            norms = self.noise.local_norms()
            gradient_norm = self.gradients.clip()
            self.optimizer.step()
        was_warming_up = self.place < self.num_warmup
        self.progress.step += 1
        self.progress.samples_seen += self.layout.global_batch
        stop = self.reporter.stop_requested()
        is_checked = self.not_finite.acts and (stop or self._is_saved(self.progress.step))
        weights_finite = not is_checked or all_finite(self.model.parameters())
        rows = self.ranks.gather(
            [loss, float(stop), float(weights_finite), float(measurement.peak_bytes), *norms]
        )
        bad = bad_ranks([row[0] for row in rows], [row[2] for row in rows])
        if bad and self.not_finite.acts:
            self._go_back(bad)
            return any(row[1] for row in rows)
        noise = self.noise.observe([row[4:] for row in rows])
        is_warming_up = self.place < self.num_warmup
        if was_warming_up and not is_warming_up:
            self.noise.forget()
        peaks = tuple(int(row[3]) for row in rows) if is_measured else ()
        if self.ranks.is_first:
            elapsed_s = time.perf_counter() - started_s
            record = StepRecord(
                step=self.progress.step,
                loss=sum(row[0] for row in rows) / len(rows),
                learning_rate=learning_rate,
                samples_seen=self.progress.samples_seen,
                global_batch=self.layout.global_batch,
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
            self.peak_watch.look_at(record)
            self.reporter.emit(record.to_event())
        if not is_warming_up:
            self._change_batch(noise)
        return any(row[1] for row in rows)

    @property
    def place(self) -> float:
        """Of the run, in steps of the job's own batch: the schedule goes by it, whatever the batch is by now."""
        return self.progress.samples_seen / self.job.base_batch

    def _next_layout(self) -> BatchLayout:
        """How the next global batch is cut: the controller's, but no more than is left of the run."""
        batch = self.job.global_batch
        if self.controller is not None:
            left = self.num_samples - self.progress.samples_seen
            batch = max(self.job.batch_unit, min(self.controller.batch, left))
        return BatchLayout.of(batch, micro_batch=self.job.micro_batch, world_size=self.ranks.world_size)

    def _set_rates(self) -> None:
        """The learning rates of the next step."""
        factor = 1.0 if self.controller is None else self.controller.rate_factor
        self.schedule.move_to(self.place, batch_factor=factor)

    def _change_batch(self, noise: NoiseScale) -> None:
        """Let the batch follow the noise; the ranks know the same noise, so they decide alike."""
        if self.controller is None:
            return
        change = self.controller.decide(noise, step=self.progress.step)
        if change is not None and self.ranks.is_first:
            event = {"event": "batch_size", "step": self.progress.step, **asdict(change)}
            self.reporter.emit({**event, "rate_factor": self.controller.rate_factor})

    def _enter(self, phase: Phase) -> None:
        """Have the optimizer and schedule of a phase, new ones."""
        self.phase = phase
        self.optimizer = phase.make_optimizer(self.model)
        self.schedule = phase.make_schedule(self.optimizer)

    def _change_optimizer(self) -> None:
        """After the last step of a phase, free its optimizer's state and go on with the next one's."""
        phase = phase_at(self.phases, self.place)
        if phase is self.phase:
            return
        self.optimizer.state.clear()
        self._enter(phase)
        self._set_rates()
        if self.ranks.is_first:
            rate = float(self.optimizer.param_groups[0]["lr"])
            event = {"event": "optimizer", "step": self.progress.step, "name": phase.name}
            self.reporter.emit({**event, "learning_rate": rate})

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

    def _is_saved(self, step: int) -> bool:
        """Whether a checkpoint of this step is due."""
        every, seen = self.job.train.checkpoint_every, self.progress.samples_seen
        return seen >= self.num_samples or (every > 0 and step % every == 0)

    def _save(self) -> None:
        """Begin to write the state of the run; every rank takes part, rank 0 writes while training goes on."""
        self.saving.settle(is_last=False)
        states = self.ranks.gather_objects(randomness.capture_state(self.ranks.device))
        state = self.state(randomness_by_rank=states)
        progress = self.progress
        loss = progress.validation_after if progress.validated_step == progress.step else None
        self.saving.start(state, step=progress.step, validation_loss=loss)

    def _go_back(self, bad: list[int]) -> None:
        """After a step that is not finite, return to the newest checkpoint; the second time leave its samples out.

        Args:
            bad: ranks that it was seen on.

        Raises:
            NotFiniteError: the job stops then, or was there too often.
        """
        failed, batch = self.progress.step, self.layout.global_batch
        self.progress.samples_seen -= batch
        fault = Fault(failed, tuple(bad), self.progress.position, batch)
        self.saving.settle(is_last=False)
        is_skipped = self.not_finite.answer(fault)
        skipped = [*self.progress.skipped, *([(fault.position, batch)] if is_skipped else [])]
        state = self.saving.newest(is_needed=True)
        assert state is not None
        self.restore(state)
        self.progress.skipped = sorted(skipped)
        if self.ranks.is_first:
            message = self.not_finite.sentence(fault, step=self.progress.step, is_skipped=is_skipped)
            event = {"event": "failure", "step": failed, "cause": "not_finite", "rank": bad[0]}
            self.reporter.emit({**event, "decision": "rollback", "message": message})
            self.reporter.emit({"event": "started", "step": self.progress.step})

    def state(self, *, randomness_by_rank: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything that the rest of the run depends on; of sharded tensors this rank's share."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "noise": self.noise.state_dict(),
            "batch_size": None if self.controller is None else self.controller.state_dict(),
            "progress": vars(self.progress).copy(),
            "randomness": randomness_by_rank,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, on every rank."""
        self.progress = Progress(**state["progress"])
        phase = phase_at(self.phases, self.place)
        if phase is not self.phase:
            self._enter(phase)
        self.model.load_state_dict(sharding.model_state_like(state["model"], self.model.state_dict()))
        self.optimizer.load_state_dict(sharding.optimizer_state_like(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(state["schedule"])
        self.noise.load_state_dict(state["noise"])
        if self.controller is not None:
            try:
                self.controller.load_state_dict(state["batch_size"])
            except ValueError as error:
                raise CheckpointError(str(error)) from error
        saved = state["randomness"]
        if len(saved) == self.ranks.world_size:
            randomness.restore_state(saved[self.ranks.rank], self.ranks.device)
        else:  # other ranks have other generators
            seed, step = self.job.train.seed, self.progress.step
            randomness.seed_all(randomness.rank_seed(seed, rank=self.ranks.rank, step=step))
