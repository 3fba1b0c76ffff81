"""The file of what `lowtide batch-size` has found about a job: every finished run, kept as soon as it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from orchestrator.batch_size.short_run import NoisePoint, RunResult
from orchestrator.job import JobSpec
from planner.inputs.strict import StrictModel, WorkloadError, sentence
from planner.whole_file import write_whole

_FORMAT = "lowtide batch-size 1"
# What two runs must share to be compared; where and with which plan they run does not matter.
_SHARED = ("model", "batch", "loss", "optimizer")
_SHARED_TRAIN = ("data", "batch_norm", "shuffle", "clip_norm", "accumulation", "workers")

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class SweepRun(StrictModel):
    """One run of the grid; see `RunRequest` and `RunResult`."""

    batch: Count
    rate: Annotated[Number, Field(gt=0)]
    seed: CountOrZero
    limit: Count
    outcome: Literal["reached", "limit", "hopeless", "diverged"]
    steps: CountOrZero
    curve: tuple[tuple[CountOrZero, Number], ...]

    @classmethod
    def of(cls, result: RunResult, *, batch: int, rate: float, seed: int, limit: int) -> SweepRun:
        """A run that has ended."""
        curve = tuple((step, float(f"{loss:.6g}")) for step, loss in result.curve)
        return cls(
            batch=batch,
            rate=rate,
            seed=seed,
            limit=limit,
            outcome=result.outcome,
            steps=result.steps,
            curve=curve,
        )


class Noise(StrictModel):
    """The noise scale at one step; see `NoisePoint`."""

    step: CountOrZero
    loss: Number
    value: Number | None
    low: Number
    high: Number | None
    reliable: bool
    reason: str = ""

    @classmethod
    def of(cls, point: NoisePoint) -> Noise:
        """A measurement."""
        return cls(**vars(point))


class SweepFound(StrictModel):
    """The runs to one target, and the noise scale along one of them."""

    target_loss: Number
    num_evaluated: Count
    runs: tuple[SweepRun, ...] = ()
    noise_batch: Count | None = None
    noise_rate: Number | None = None
    noise: tuple[Noise, ...] = ()


class BranchRun(StrictModel):
    """One branch: `factor` times the batch from the checkpoint on."""

    factor: Count
    seed: CountOrZero
    rate: Annotated[Number, Field(gt=0)]
    outcome: Literal["limit", "diverged"]
    loss_before: Number
    loss_after: Number | None


class BranchesFound(StrictModel):
    """The branches of one checkpoint."""

    checkpoint: str
    step: CountOrZero
    batch: Count
    window: Count
    num_evaluated: Count
    runs: tuple[BranchRun, ...] = ()


class ProbeFound(StrictModel):
    """The noise scale at the weights of one step."""

    batch: Count
    rate: Number
    noise: Noise


class Found(StrictModel):
    """The file.

    Attributes:
        job: what its runs share.
        answer: what was made of the runs when the command last ended; nothing is read from it.
    """

    format: Literal["lowtide batch-size 1"] = _FORMAT
    job: dict[str, Any]
    probe: ProbeFound | None = None
    sweep: SweepFound | None = None
    branched: BranchesFound | None = None
    answer: dict[str, Any] = Field(default_factory=dict)


def identity(job: JobSpec) -> dict[str, Any]:
    """What two runs of a job must share to be compared, as plain data."""
    data = json.loads(json.dumps(job.to_data()))
    return {key: data[key] for key in _SHARED} | {f"train.{key}": data["train"][key] for key in _SHARED_TRAIN}


class ResultsFile:
    """What has been found so far, written whole after each change.

    Args:
        path: of the file; read where it exists.
        job: whose it must be.

    Raises:
        WorkloadError: it is damaged or of another job; it is left as it is.
    """

    def __init__(self, path: Path, job: JobSpec) -> None:
        self.path = path
        self.found = Found(job=identity(job))
        self._text: str | None = None
        if path.exists():
            self.found, self._text = _read(path)
            before, now = self.found.job, identity(job)
            changed = [key for key in now if before.get(key) != now[key]]
            if changed:
                raise WorkloadError(
                    f"{path} holds the runs of another job: it differs in {', '.join(changed)}. "
                    "Name another file with --out."
                )

    def change(self, **sections: Any) -> None:
        """Replace sections, and write the file.

        Raises:
            ValueError: it cannot be written, or another command has written it meanwhile.
        """
        before = self.path.read_text(encoding="utf-8") if self.path.exists() else None
        if before != self._text:
            raise ValueError(
                f"{self.path} was changed by another command meanwhile, whose runs are kept. Wait for its end, and "
                "start this one again."
            )
        self.found = self.found.model_copy(update=sections)
        self._text = self.found.model_dump_json() + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, self._text)


def _read(path: Path) -> tuple[Found, str]:
    """What the file holds, and its text."""
    try:
        text = path.read_text(encoding="utf-8")
        return Found.model_validate_json(text), text
    except ValidationError as error:
        reason = sentence(error, source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{path}: {error}"
    raise WorkloadError(
        f"{reason[:300]}. It is no whole file of lowtide batch-size and was left as it is; name another with "
        "--out, or move it away."
    )
