"""`batch-size` as a command of typer: how large a batch pays, by the gradient noise, a sweep, or branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cost_models.units import parse_seconds
from orchestrator.job import JobSpec
from planner.cli.answer import Answer
from planner.cli.request import AsJson, JobPath, PicturePath, check_apart, check_picture
from planner.inputs.yaml_reader import read_yaml
from planner.whole_file import check_writable

Question = Literal["probe", "sweep", "branched"]
_LARGEST = 1 << 24
_SEEDS = {"probe": 1, "sweep": 1, "branched": 5}

Sweep = Annotated[
    bool, typer.Option("--sweep", help="Count steps to --target-loss over batch sizes and rates.")
]
Branched = Annotated[
    bool, typer.Option("--branched", help="Try multiples of the batch from --checkpoint on.")
]
TargetLoss = Annotated[
    float | None, typer.Option("--target-loss", help="Training loss that counts as reached.")
]
Batches = Annotated[
    str | None,
    typer.Option("--batches", help="Of the sweep: 8,32,128. Around the job's if not given."),
]
Rates = Annotated[
    str | None,
    typer.Option(
        "--rates",
        help="Of the sweep: 0.01,0.02. If not given, powers of two around the rule's, and on.",
    ),
]
Factors = Annotated[str, typer.Option("--factors", help="Of the branches.")]
Window = Annotated[int, typer.Option("--window", min=1, help="Of a branch, in steps of the job's batch.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, max=100, help="Runs a cell: 1, branched 5.")]
MaxSteps = Annotated[
    int | None,
    typer.Option("--max-steps", min=1, help="Of a run of the sweep; train.steps if not given."),
]
Evaluate = Annotated[int, typer.Option("--evaluate", min=1, help="Training samples whose loss is watched.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="RUN_DIR", help="Of a run, or one of its checkpoints."),
]
TimeLimit = Annotated[str, typer.Option("--time-limit", help="Of the probe.")]
Parallel = Annotated[
    int | None,
    typer.Option("--parallel", min=1, help="Runs at the same time; one a core if not given."),
]
RayAddress = Annotated[str | None, typer.Option(help="Join a Ray cluster: HOST:PORT, or auto.")]
Backend = Annotated[str | None, typer.Option(help="Replaces train.backend: ray or local.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Results, continued; RUNS/NAME-batch-size.json if not given."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


@dataclass(frozen=True)
class BatchSizeRequest:
    """What is asked; what needs the job's data is checked later.

    Attributes:
        path: of the job file, as the user wrote it.
        job: as it is to run.
        question: which method.
        target_loss: of the sweep.
        batches: of the sweep; () for those around the job's.
        rates: of the sweep; () for those around the rule's.
        factors: of the branches.
        window: steps of the job's batch that a branch lasts.
        seeds: runs a cell.
        max_steps: of the sweep; see `Grid`.
        num_evaluated: training samples whose mean loss is watched.
        checkpoint: of a run, its folder or that of one checkpoint; None for new weights.
        time_limit_s: of the probe.
        parallel: runs at the same time; None for as many as there is room for.
        address: of a Ray cluster.
        out: the file of results.
        picture: for the figure; None for none.
        quiet: no progress.
    """

    path: Path
    job: JobSpec
    question: Question
    target_loss: float | None
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    factors: tuple[int, ...]
    window: int
    seeds: tuple[int, ...]
    max_steps: int
    num_evaluated: int
    checkpoint: Path | None
    time_limit_s: float
    parallel: int | None
    address: str | None
    out: Path
    picture: Path | None
    quiet: bool

    def __post_init__(self) -> None:
        if self.question == "sweep":
            if self.target_loss is None:
                raise ValueError(
                    "--sweep needs --target-loss: the training loss that counts as reached. `lowtide batch-size "
                    f"{self.path}` alone says where the loss begins."
                )
            if not math.isfinite(self.target_loss):
                raise ValueError(f"--target-loss must be a finite number, got {self.target_loss}.")
            if self.batches and len(self.batches) < 3:
                raise ValueError(
                    f"a sweep needs at least three batch sizes to fit a curve to, got {list(self.batches)}. "
                    "Give more with --batches."
                )
        elif self.target_loss is not None or self.batches or self.rates:
            raise ValueError(
                "--target-loss, --batches and --rates go with --sweep. Leave them out, or sweep."
            )
        if self.question == "branched" and self.checkpoint is None:
            raise ValueError(
                "--branched needs --checkpoint RUN_DIR: branches start from a checkpoint of a run. "
                f"`lowtide train {self.path}` makes one."
            )
        if self.question == "branched" and len(self.seeds) < 2:
            raise ValueError("--branched needs at least 2 --seeds: its test compares branches seed by seed.")
        if self.question == "branched" and any(self.window % factor for factor in self.factors):
            raise ValueError(
                f"--window {self.window} must be a multiple of each of --factors {list(self.factors)}, so that all "
                "branches see the same examples."
            )
        if self.question == "sweep" and self.checkpoint is not None:
            raise ValueError(
                "--sweep starts from new weights. Leave out --checkpoint, or ask for --branched."
            )
        if self.address is not None and self.job.train.backend == "local":
            raise ValueError("--address needs train.backend 'ray', got 'local'; use --backend ray.")


def batch_size_command(
    *, guard: Callable[..., AbstractContextManager[None]], show: Callable[[Answer, bool], None]
) -> Callable[..., None]:
    """The command.

    Args:
        guard: turns what is raised into a sentence and an exit status.
        show: prints.
    """

    def batch_size(
        job: JobPath,
        sweep: Sweep = False,
        branched: Branched = False,
        target_loss: TargetLoss = None,
        batches: Batches = None,
        rates: Rates = None,
        factors: Factors = "2,4,8,16",
        window: Window = 64,
        seeds: Seeds = None,
        max_steps: MaxSteps = None,
        evaluate: Evaluate = 512,
        checkpoint: Checkpoint = None,
        time_limit: TimeLimit = "60s",
        parallel: Parallel = None,
        address: RayAddress = None,
        backend: Backend = None,
        out: Out = None,
        picture: PicturePath = None,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        """Say how large a batch pays: by the gradient noise, in a minute; by a sweep; or by branches of a run."""
        with guard(as_json=as_json):
            if sweep and branched:
                raise ValueError("--sweep and --branched are different questions. Ask one at a time.")
            question: Question = "sweep" if sweep else "branched" if branched else "probe"
            spec = _trained(job, backend)
            path = out or Path(spec.train.run_dir) / f"{spec.name}-batch-size.json"
            _check_files(job, out=out, results=path, picture=picture, question=question)
            request = BatchSizeRequest(
                path=job,
                job=spec,
                question=question,
                target_loss=target_loss,
                batches=_counts(batches, "--batches"),
                rates=_rates(rates),
                factors=_counts(factors, "--factors", least=2),
                window=window,
                seeds=tuple(spec.train.seed + k for k in range(seeds or _SEEDS[question])),
                max_steps=max_steps or spec.train.steps,
                num_evaluated=evaluate,
                checkpoint=checkpoint,
                time_limit_s=_seconds(time_limit),
                parallel=parallel,
                address=address,
                out=path,
                picture=picture,
                quiet=quiet,
            )
            # Torch takes seconds; what is wrong with the words is said before.
            from orchestrator.batch_size.job import answer_batch_size

            answer = answer_batch_size(request)
            show(answer, as_json)
            raise typer.Exit(answer.status)

    return batch_size


def _trained(path: Path, backend: str | None) -> JobSpec:
    """The job of a file, with another backend where one is named.

    Raises:
        ValueError: it says nothing of training, or is wrong.
    """
    if "train" not in read_yaml(path):
        raise ValueError(f"{path} has no part `train`, so it can be planned but not trained. Add one.")
    return JobSpec.load(path).with_changes({} if backend is None else {"backend": backend})


def _check_files(
    job: Path, *, out: Path | None, results: Path, picture: Path | None, question: Question
) -> None:
    """Raise ValueError where a file cannot be written, or would replace another."""
    if out is not None:
        check_writable(out, option="--out")
    if picture is not None:
        check_picture(picture)
        if question == "probe":
            raise ValueError("--picture goes with --sweep or --branched. Leave it out, or ask for one.")
    check_apart({"JOB": job, "--out": results, "--picture": picture})


def _seconds(text: str) -> float:
    found = parse_seconds(text)
    if not 0 < found <= 3600:
        raise ValueError(f"--time-limit must be more than 0 and at most 1h, got {text!r}. Write '60s'.")
    return found


def _counts(text: str | None, option: str, *, least: int = 1) -> tuple[int, ...]:
    words = [] if text is None else text.split(",")
    if not all(word.strip().isdecimal() and least <= int(word) <= _LARGEST for word in words):
        raise ValueError(
            f"{option} must list whole numbers from {least} to 2^24, got {text!r}. Write 8,32,128."
        )
    return tuple(sorted({int(word) for word in words}))


def _rates(text: str | None) -> tuple[float, ...]:
    try:
        found = sorted({float(word) for word in ([] if text is None else text.split(","))})
    except ValueError:
        found = [math.nan]
    if not all(0 < rate < math.inf for rate in found):
        raise ValueError(f"--rates must list numbers above 0, got {text!r}. Write 0.01,0.02.")
    return tuple(found)
