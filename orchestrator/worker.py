"""What one rank does, straight down: seed, build, plan, restore, train."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planner
from orchestrator import randomness, sharding
from orchestrator.checkpoint import CheckpointError, CheckpointStore, load_state, step_of
from orchestrator.data import load_datasets
from orchestrator.job import JobSpec
from orchestrator.metrics import Reporter
from orchestrator.phases import phases_of
from orchestrator.ranks import Ranks
from orchestrator.trainer import Trainer
from orchestrator.validation import Validation
from planner.blocks import block_names
from planner.errors import PlanMismatchError
from planner.inputs.strict import WorkloadError
from planner.step import StepModule


@dataclass(frozen=True)
class Assignment:
    """What every rank of a run is given: plain values, so that it can be sent to any process.

    Attributes:
        job: the job as `JobSpec.to_data` writes it.
        folder: what the job's file targets are relative to.
        run_dir: the run's folder; every rank must see the same one.
        plan: of the whole step, as JSON; None trains without one. A plan of the whole step calls no block, so under
            FSDP2 its parameters are gathered all together.
        block_plans: name of a block -> the plan of that block, as JSON; see `planner.blocks`.
        block_promise: predicted peak and budget of a rank with these, in bytes.
    """

    job: Mapping[str, Any]
    folder: str
    run_dir: str
    plan: str | None
    block_plans: Mapping[str, str] = field(default_factory=dict)
    block_promise: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and self.block_plans:
            raise ValueError("a step has one plan, or one for each of its blocks, not both")

    def read_job(self) -> JobSpec:
        """The job, its file targets resolved against `folder`."""
        return JobSpec.from_data(self.job, folder=Path(self.folder), source="job")


@dataclass(frozen=True)
class Outcome:
    """How a rank's training ended.

    Attributes:
        finished: False where it was stopped before its last step.
        step: steps done.
        validation_before: mean validation loss before the first step.
        validation_after: mean validation loss when it was last measured; None where it was stopped before.
        validated_step: and when that was.
        recommended_batch: samples a step; None where the noise scale is not known well enough.
        recommended_because: why, or why not, in a sentence.
    """

    finished: bool
    step: int
    validation_before: float | None
    validation_after: float | None
    validated_step: int
    recommended_batch: int | None
    recommended_because: str


class RankError(RuntimeError):
    """One rank's training failed.

    Attributes:
        bad_input: what the user wrote is the cause.
    """

    def __init__(self, message: str, bad_input: bool) -> None:
        super().__init__(message, bad_input)
        self.bad_input = bad_input

    def __str__(self) -> str:
        return self.args[0]


def train_rank(
    assignment: Assignment, *, rank: int, world_size: int, device_index: int, reporter: Reporter
) -> Outcome:
    """Train as one rank of `world_size`; with several, torch's default process group must exist.

    Raises:
        RankError: whatever went wrong, in one sentence that names the rank. Where the cause is not something
            that the user wrote, the traceback is in the run's folder.
    """
    forward = _ForwardWarnings(reporter, rank)
    logging.getLogger().addHandler(forward)
    try:
        return _train(
            assignment, rank=rank, world_size=world_size, device_index=device_index, reporter=reporter
        )
    except (WorkloadError, PlanMismatchError, CheckpointError) as error:
        raise RankError(f"rank {rank}: {error}", bad_input=True) from error
    except Exception as error:
        details = Path(assignment.run_dir) / f"error-rank-{rank}.txt"
        details.write_text(traceback.format_exc(), encoding="utf-8")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RankError(
            f"rank {rank}: {reason[:500]}; the traceback is in {details}", bad_input=False
        ) from error
    finally:
        logging.getLogger().removeHandler(forward)


class _ForwardWarnings(logging.Handler):
    """Tells whoever started the run what this project's modules warn of."""

    def __init__(self, reporter: Reporter, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter
        self._rank = rank
        self.addFilter(
            lambda record: record.name.partition(".")[0] in ("cost_models", "planner", "orchestrator")
        )

    def emit(self, record: logging.LogRecord) -> None:
        message = f"rank {self._rank}: {record.getMessage()}"
        self._reporter.emit({"event": "warning", "step": 0, "message": message})


def _train(
    assignment: Assignment, *, rank: int, world_size: int, device_index: int, reporter: Reporter
) -> Outcome:
    job = assignment.read_job()
    ranks = Ranks(rank=rank, world_size=world_size, device=_device(job, device_index))
    torch.set_num_threads(job.train.threads_per_worker)

    randomness.seed_all(job.train.seed)
    model = job.build_model(fake=False).to(ranks.device)
    plan = None if assignment.plan is None else planner.Plan.from_json(assignment.plan)
    blocks = block_names(model)
    model = with_block_plans(model, assignment.block_plans)
    plain_module = with_loss(job, model).train()
    step_module = plain_module if plan is None else planner.apply(plain_module, plan)
    if world_size > 1 and job.train.sharding == "ddp":
        step_module = sharding.data_parallel(step_module)
    elif world_size > 1:
        sharding.shard(
            model if plan is None else step_module,
            blocks=blocks if plan is None else (),
            reshard_after_forward=job.train.sharding == "fsdp",
            device=ranks.device,
        )
        plain_module = step_module  # whose hooks gather the parameters, in validation too

    train_set, validation_set = load_datasets(job.train.data)
    store = CheckpointStore(Path(assignment.run_dir) / "checkpoints", keep=job.train.keep_checkpoints)
    randomness.seed_all(randomness.rank_seed(job.train.seed, rank=rank))
    trainer = Trainer(
        job=job,
        ranks=ranks,
        step_module=step_module,
        plain_module=plain_module,
        model=model,
        phases=phases_of(job),
        train_set=train_set,
        validation=Validation(
            job=job,
            ranks=ranks,
            module=plain_module,
            model=model,
            train_set=train_set,
            validation_set=validation_set,
        ),
        reporter=reporter,
        store=store,
        promise=assignment.block_promise if plan is None else (plan.predicted_peak_bytes, plan.budget_bytes),
    )
    _restore(trainer, store, ranks)
    if ranks.is_first:
        reporter.emit({"event": "started", "step": trainer.progress.step})
    finished = trainer.run()
    if finished and job.train.average is not None:
        trainer.evaluate_average(Path(assignment.run_dir) / "averaged.pt")
    progress = trainer.progress
    advice = trainer.noise.advice()
    return Outcome(
        finished=finished,
        step=progress.step,
        validation_before=progress.validation_before,
        validation_after=progress.validation_after,
        validated_step=progress.validated_step,
        recommended_batch=advice.batch,
        recommended_because=advice.reason,
    )


def with_loss(job: JobSpec, model: nn.Module) -> nn.Module:
    """(inputs, targets) -> scalar loss: the model and the job's loss, or a model that returns its own."""
    loss = job.loss_fn()
    return model if loss is None else StepModule(model, loss)


def with_block_plans(model: nn.Module, plans: Mapping[str, str]) -> nn.Module:
    """The model with some of its blocks replaced by planned ones; its state dict stays the same.

    Args:
        model: changed in place; parameters whole.
        plans: name of a module below it -> its plan as JSON.

    Raises:
        PlanMismatchError: the model has no such block, or a plan was made for another one.
    """
    for name, text in plans.items():
        parent, _, leaf = name.rpartition(".")
        try:
            block = model.get_submodule(name)
        except AttributeError as error:
            raise PlanMismatchError(
                f"there is a plan for the block {name!r}, but the model has none of that name. Plan again for it."
            ) from error
        setattr(model.get_submodule(parent), leaf, planner.apply(block, planner.Plan.from_json(text)))
    return model


def _restore(trainer: Trainer, store: CheckpointStore, ranks: Ranks) -> None:
    """Continue from the newest valid checkpoint, if there is one; rank 0 chooses for all."""
    chosen = None
    if ranks.is_first:
        store.remove_partial()
        chosen = store.newest_valid()
    chosen = ranks.from_first(chosen)
    if chosen is None:
        return
    if not chosen.is_dir():
        raise CheckpointError(
            f"rank {ranks.rank} does not see {chosen}; train.run_dir must be storage that all nodes share"
        )
    trainer.restore(load_state(chosen))
    assert trainer.progress.step == step_of(chosen)


def _device(job: JobSpec, index: int) -> torch.device:
    if job.train.device == "cpu":
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise WorkloadError(
            f"train.device is 'cuda' and this rank needs CUDA device {index}, but {torch.cuda.device_count()} are "
            "here; use 'cpu', or fewer workers on this machine"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
