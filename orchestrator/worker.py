"""What one rank does, straight down: seed, build, plan, restore, train."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planner
from orchestrator import randomness, sharding
from orchestrator.checkpoint import CheckpointStore
from orchestrator.checkpoint_places import place_of
from orchestrator.data import load_datasets
from orchestrator.job import JobSpec
from orchestrator.metrics import Reporter
from orchestrator.phases import phases_of
from orchestrator.plan_check import check_same_plan, digest_of_plans
from orchestrator.rank_errors import rank_error
from orchestrator.ranks import Ranks
from orchestrator.saving import Saving
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
        must_continue: the run has written a checkpoint before, so it may not begin anew.
        plan_digest: of the plans as they were made, see `plan_check`; None compares with this process's own.
    """

    job: Mapping[str, Any]
    folder: str
    run_dir: str
    plan: str | None
    block_plans: Mapping[str, str] = field(default_factory=dict)
    block_promise: tuple[int, int] | None = None
    must_continue: bool = False
    plan_digest: str | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and self.block_plans:
            raise ValueError("a step has one plan, or one for each of its blocks, not both")

    @property
    def promise(self) -> tuple[int, int] | None:
        """Predicted peak and budget of a rank, in bytes; None for plain training."""
        if self.plan is None:
            return self.block_promise
        plan = planner.Plan.from_json(self.plan)
        return plan.predicted_peak_bytes, plan.budget_bytes

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
    except Exception as error:
        device = torch.device(assignment.job["train"]["device"])
        run_dir, promise = Path(assignment.run_dir), assignment.promise
        raise rank_error(error, rank=rank, run_dir=run_dir, promise=promise, device=device) from error
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

    check_same_plan(
        ranks,
        plan=assignment.plan,
        block_plans=assignment.block_plans,
        sent=assignment.plan_digest or digest_of_plans(assignment.plan, assignment.block_plans),
    )

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
    store = CheckpointStore(
        place_of(job.train.checkpoint_dir, Path(assignment.run_dir)),
        keep=job.train.keep_checkpoints,
        keep_best=job.train.keep_best,
    )
    is_sharded = sharding.is_sharded(step_module)
    saving = Saving(store, ranks=ranks, reporter=reporter, is_sharded=is_sharded)
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
        saving=saving,
        promise=assignment.promise,
    )
    _restore(trainer, saving, is_needed=assignment.must_continue)
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


def _restore(trainer: Trainer, saving: Saving, *, is_needed: bool) -> None:
    """Continue from the newest checkpoint, if there is one; nothing holds what was read of it afterwards."""
    state = saving.newest(is_needed=is_needed)
    if state is not None:
        trainer.restore(state)


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
