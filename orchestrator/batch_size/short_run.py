"""One short run of a job at another batch and rate, on one worker: to a loss, or over a window."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orchestrator import randomness
from orchestrator.batch_size.fixed_noise import measure_noise
from orchestrator.batch_size.noise_scale import NoiseScale
from orchestrator.checkpoint import CheckpointError, load_state
from orchestrator.data import MapDataset, SampleStream, collate, load_datasets, validation_indices
from orchestrator.job import JobSpec
from orchestrator.metrics import finite
from orchestrator.phases import phases_of
from orchestrator.worker import with_loss
from planner.inputs.strict import WorkloadError
from planner.step import call_model

Result = Literal["reached", "limit", "hopeless", "diverged"]
# Evaluations lie this far apart, as a share of the steps done: a step count is known to 5 %.
_EVALUATE_EVERY = 1.05
_MEASURE_NOISE_EVERY = 1.5
_DIVERGED = 10.0
# A run is hopeless once it has not come, in s steps, to where the best one was after s / 4.
_HOPELESS_FACTOR = 4
_MIN_HOPELESS_STEP = 16
_LARGEST_SMALL_BATCH = 32


@dataclass(frozen=True)
class RunRequest:
    """What is to be run; plain values, so that it can be sent to any process.

    Attributes:
        job: as `JobSpec.to_data` writes it.
        folder: what its file targets are relative to.
        batch: examples of a step.
        rate: learning rate, the same in all steps.
        seed: of the initial weights (without a checkpoint) and of the order of the data.
        limit: most steps.
        target_loss: ends the run when the evaluated loss is there; None runs to the limit.
        num_evaluated: training samples whose mean loss is watched, the same in every run.
        pace: (step, loss) of the best run of this batch so far; a run that falls far behind it is ended.
        checkpoint: folder of a checkpoint to start from; None starts from new weights.
        noise_examples: examples spent on each measurement of the noise scale along the run; 0 for none.
    """

    job: Mapping[str, Any]
    folder: str
    batch: int
    rate: float
    seed: int
    limit: int
    target_loss: float | None
    num_evaluated: int
    pace: tuple[tuple[int, float], ...] = ()
    checkpoint: str | None = None
    noise_examples: int = 0


@dataclass(frozen=True)
class NoisePoint:
    """The noise scale at one step of a run.

    Attributes:
        step: done before.
        loss: evaluated there.
        value: B_simple in examples; None where it is not known.
        low: lower end of its interval.
        high: upper end; None for no bound.
        reliable: as in `NoiseScale`.
        reason: likewise.
    """

    step: int
    loss: float
    value: float | None
    low: float
    high: float | None
    reliable: bool
    reason: str

    @classmethod
    def of(cls, found: NoiseScale, *, step: int, loss: float) -> NoisePoint:
        """An estimate at a step."""
        low, high = found.interval
        return cls(step, loss, finite(found.value), low, finite(high), found.reliable, found.reason)


@dataclass(frozen=True)
class RunResult:
    """What came of it.

    Attributes:
        outcome: "reached" the target, "limit" of steps, "hopeless" beside the pace, or "diverged".
        steps: done; to the target, where it was reached.
        curve: (step, evaluated loss), step 0 first; losses that are not finite are left out.
        noise: measured along the run.
    """

    outcome: Result
    steps: int
    curve: tuple[tuple[int, float], ...]
    noise: tuple[NoisePoint, ...] = ()


@dataclass(frozen=True)
class RunFailure:
    """A run that could not be made.

    Attributes:
        message: a sentence.
        bad_input: what the user wrote is the cause.
    """

    message: str
    bad_input: bool


def run_short(request: RunRequest) -> RunResult | RunFailure:
    """Do a run; what goes wrong is a value, so that it can cross processes."""
    try:
        return ShortRun(request).run()
    except Exception as error:  # the user's own code may raise anything
        return failure_of(error, f"the run at batch {request.batch}, rate {request.rate:g}")


def failure_of(error: Exception, what: str) -> RunFailure:
    """What went wrong in a run, in a sentence."""
    if isinstance(error, WorkloadError | CheckpointError):
        return RunFailure(str(error), bad_input=True)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return RunFailure(f"{what}: {reason[:500]}", bad_input=False)


@functools.lru_cache(maxsize=1)
def _data_of(job: str, folder: str) -> MapDataset:
    """The training set, read once in a process: a task follows another of the same job."""
    return load_datasets(JobSpec.from_data(json.loads(job), folder=Path(folder), source="job").train.data)[0]


class ShortRun:
    """The model, optimizer and data of a request, ready to run.

    Raises:
        WorkloadError, CheckpointError: something of the job or the checkpoint cannot be used.
    """

    def __init__(self, request: RunRequest) -> None:
        self.request = request
        self.job = JobSpec.from_data(request.job, folder=Path(request.folder), source="job")
        train = self.job.train
        self.device = torch.device(train.device)
        torch.set_num_threads(train.threads_per_worker)
        self.train_set = _data_of(json.dumps(dict(request.job)), request.folder)
        randomness.seed_all(request.seed)
        self.model = self.job.build_model(fake=False).to(self.device)
        self.module = with_loss(self.job, self.model).train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.phase = phases_of(at_rate(self.job, request.rate))[0]
        self.optimizer = self.phase.make_optimizer(self.model)
        if request.checkpoint is not None:
            self._restore(request.checkpoint)
        self.stream = SampleStream(len(self.train_set), seed=request.seed, shuffle=train.shuffle)
        watched = validation_indices(len(self.train_set), wanted=request.num_evaluated)
        size = self.job.micro_batch
        # Looked at again and again, so they are read once.
        self.watched = [self._read(watched[start : start + size]) for start in range(0, len(watched), size)]
        self.steps = 0

    def _restore(self, checkpoint: str) -> None:
        state = load_state(Path(checkpoint))
        rates = [group["lr"] for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"checkpoint {checkpoint} is not of this model and optimizer: {reason[:200]}. "
                "Name one that is."
            ) from error
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _read(self, indices: list[int]) -> tuple[Any, Any, int]:
        return *collate(self.train_set, indices, device=self.device), len(indices)

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        module: Any = self.module
        return call_model(module, inputs) if self.job.loss is None else module(inputs, targets)

    def loss_of(self, indices: Tensor) -> Tensor:
        """Mean loss of the training samples of some indices."""
        inputs, targets, _ = self._read(indices.tolist())
        return self._loss(inputs, targets)

    def step(self) -> float:
        """One step over the next examples; the mean loss of them before it."""
        request = self.request
        indices = self.stream.indices(self.steps * request.batch, request.batch)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(indices), self.job.micro_batch):
            inputs, targets, count = self._read(indices[start : start + self.job.micro_batch])
            loss = self._loss(inputs, targets) * (count / len(indices))
            loss.backward()
            total += loss.item()
        if self.job.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.job.train.clip_norm)
        self.optimizer.step()
        self.steps += 1
        return total

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the watched training samples, in evaluation mode."""
        self.module.eval()
        total = sum(self._loss(inputs, targets).item() * count for inputs, targets, count in self.watched)
        self.module.train()
        return total / sum(count for _, _, count in self.watched)

    def noise(self, *, num_examples: int | None, deadline_s: float = math.inf) -> NoiseScale:
        """The noise scale at the present weights; see `measure_noise`."""
        seed = randomness.rank_seed(self.request.seed, rank=0, step=self.steps + 1)
        return measure_noise(
            self.module,
            self.loss_of,
            num_samples=len(self.train_set),
            micro_batch=min(self.job.micro_batch, _LARGEST_SMALL_BATCH),
            generator=torch.Generator().manual_seed(seed),
            num_examples=num_examples,
            deadline_s=deadline_s,
        )

    def _noise_point(self, loss: float) -> NoisePoint:
        found = self.noise(num_examples=self.request.noise_examples)
        return NoisePoint.of(found, step=self.steps, loss=loss)

    def run(self) -> RunResult:
        """Step and evaluate until the target, the limit, or the end of hope."""
        request = self.request
        loss = self.evaluate()
        curve, noise = [(0, loss)], []
        first, best = loss, loss
        next_evaluation, next_noise = 1, 0.0
        while True:
            if request.noise_examples and self.steps >= next_noise:
                noise.append(self._noise_point(loss))
                next_noise = max(self.steps + 1.0, self.steps * _MEASURE_NOISE_EVERY)
            outcome: Result | None = None
            if request.target_loss is not None and loss <= request.target_loss:
                outcome = "reached"
            elif not loss < _DIVERGED * max(first, 1e-3):
                outcome = "diverged"
            elif self.steps >= request.limit:
                outcome = "limit"
            elif self._is_hopeless(best):
                outcome = "hopeless"
            if outcome is not None:
                if request.noise_examples and noise[-1].step != self.steps and outcome != "diverged":
                    noise.append(self._noise_point(loss))
                kept = tuple((step, value) for step, value in curve if math.isfinite(value))
                return RunResult(outcome, self.steps, kept, tuple(noise))
            while self.steps < min(next_evaluation, request.limit):
                if not math.isfinite(self.step()):
                    break
            loss = self.evaluate()
            best = min(best, loss)
            curve.append((self.steps, loss))
            next_evaluation = max(self.steps + 1, math.ceil(self.steps * _EVALUATE_EVERY))

    def _is_hopeless(self, best: float) -> bool:
        """Whether the best run of this batch was further after a quarter of the steps."""
        if self.steps < _MIN_HOPELESS_STEP or not self.request.pace:
            return False
        reached = [loss for step, loss in self.request.pace if step <= self.steps / _HOPELESS_FACTOR]
        return bool(reached) and best > min(reached)


def at_rate(job: JobSpec, rate: float) -> JobSpec:
    """The job with one rate, without an average of its weights."""
    optimizer = job.optimizer.model_copy(update={"lr": rate})
    return job.model_copy(
        update={"optimizer": optimizer, "train": job.train.model_copy(update={"average": None})}
    )
