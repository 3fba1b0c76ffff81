"""The folder of one run: plan.json, metrics.jsonl, checkpoints/, tensorboard/, run.json, figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.job import JobSpec
from planner.inputs.strict import WorkloadError

_PACKAGES = ("lowtide", "torch", "numpy", "ray", "pulp", "highspy")
# What a run may not change when it is continued: another value would continue another experiment.
_FIXED = ("model", "batch", "loss", "optimizer")
_FIXED_TRAIN = ("data", "seed", "shuffle", "accumulation", "batch_size", "steps", "schedule", "clip_norm")
_FIXED_TRAIN += ("batch_norm", "average", "checkpoint_dir")
# What it may change, and is then planned anew for.
_PLANNED = ("batch", "budget", "hardware", "measurements", "executor", "solver")
_PLANNED_TRAIN = (
    "workers",
    "accumulation",
    "batch_size",
    "sharding",
    "planning",
    "device",
    "threads_per_worker",
)
# What `batch_size: auto` may choose in the place of the job.
_DIVISION = ("workers", "sharding", "planning")


class RunFolder:
    """Paths of a run's files, and its run.json.

    Args:
        path: of the folder, which exists.
        before: the job of the run that is continued, as it ran; None for a new one.
        asked_before: that job as it was asked for.
        was_left_running: that run ended without a word.
    """

    def __init__(
        self,
        path: Path,
        *,
        before: JobSpec | None = None,
        asked_before: Mapping[str, Any] | None = None,
        was_left_running: bool = False,
    ) -> None:
        self.was_left_running = was_left_running
        self._before, self._asked_before = before, asked_before or {}
        self.path = path.resolve()
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.mlflow_run = self.path / "mlflow-run.txt"
        self.record = self.path / "run.json"
        self.loss_figure = self.path / "loss.png"
        self.memory_figure = self.path / "memory.png"

    @classmethod
    def create(cls, parent: Path, name: str) -> RunFolder:
        """A new folder, named after the job and the time.

        Raises:
            WorkloadError: it cannot be made.
        """
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            path = parent / f"{stem}{suffix}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise WorkloadError(
                    f"the run folder {path} cannot be made: {error.strerror}. Give another --run-dir"
                ) from error
            return cls(path)
        raise WorkloadError(f"{parent} already has 99 runs named {stem}. Give another --run-dir")

    @staticmethod
    def read_record(path: Path) -> dict[str, Any]:
        """The run.json of an earlier run's folder.

        Raises:
            WorkloadError: there is none.
        """
        try:
            record = json.loads((path / "run.json").read_text(encoding="utf-8"))
            configuration, overrides = record["configuration"], record["overrides"]
            running = record.get("running", configuration)
            return {
                "configuration": configuration,
                "running": running,
                "overrides": overrides,
                "status": record.get("status"),
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkloadError(f"--resume {path}: there is no run.json of an earlier run in it") from error

    @classmethod
    def reopen(cls, path: Path, job: JobSpec) -> RunFolder:
        """The folder of an earlier run of the same job.

        Raises:
            WorkloadError: it is none, or the job has changed in what a continued run must keep.
        """
        record = cls.read_record(path)
        before = record["configuration"]
        now = job.to_data()
        changed = [key for key in _FIXED if _given(before.get(key)) != _given(now[key])]
        changed += [
            f"train.{key}"
            for key in _FIXED_TRAIN
            if _given(before.get("train", {}).get(key)) != _given(now["train"][key])
        ]
        if changed:
            raise WorkloadError(
                f"--resume {path}: the job now differs in {', '.join(changed)}; undo that, "
                "or start a new run without --resume"
            )
        running = JobSpec.from_data(record["running"], folder=job.model.folder, source=str(path / "run.json"))
        was_left_running = record["status"] == "running"
        return cls(path, before=running, asked_before=before, was_left_running=was_left_running)

    def continued(self, job: JobSpec) -> JobSpec:
        """The job as this run goes on: its global batch stays, however many workers there are now.

        How the step was divided for the run stays too, but for what the job now asks for in another way.

        Raises:
            WorkloadError: the workers cannot share the batch in whole micro-batches.
        """
        before = self._before
        if before is None:
            return job
        changed, ran = job.to_data(), before.to_data()
        for key in _DIVISION:
            if changed["train"][key] == self._asked_before["train"].get(key):
                changed["train"][key] = ran["train"][key]
        if job.train.elastic is not None:
            if before.train.batch_size is None:
                changed["train"] |= {"batch_size": before.global_batch, "accumulation": 1}
            return JobSpec.from_data(changed, folder=job.model.folder, source=f"--resume {self.path}")
        workers = changed["train"]["workers"]
        unit = before.micro_batch * workers
        if before.global_batch % unit:
            raise WorkloadError(
                f"--resume {self.path}: the run has batches of {before.global_batch}, which {workers} workers "
                f"cannot share in micro-batches of {before.micro_batch}; set train.workers to a number that "
                f"divides {before.global_batch // before.micro_batch}"
            )
        if changed["budget"] == self._asked_before.get(
            "budget"
        ):  # lowered where a rank had too little memory
            changed["budget"] = ran["budget"]
        changed["batch"] = ran["batch"]
        changed["train"]["batch_size"] = ran["train"]["batch_size"]
        if before.train.batch_size is None:
            changed["train"]["accumulation"] = before.global_batch // unit
        return JobSpec.from_data(changed, folder=job.model.folder, source=f"--resume {self.path}")

    def was_planned_as(self, job: JobSpec) -> bool:
        """Whether this continues a run whose plan is the one that the job asks for."""
        if self._before is None:
            return False
        now, before = job.to_data(), self._before.to_data()
        return all(before[key] == now[key] for key in _PLANNED) and all(
            before["train"][key] == now["train"][key] for key in _PLANNED_TRAIN
        )

    def write_record(
        self, job: JobSpec, overrides: Mapping[str, Any], *, running: JobSpec, **more: Any
    ) -> None:
        """Write run.json: what was run, with which versions, on what.

        Args:
            job: as it was asked for.
            running: as it runs: with the batch that was chosen for it, or that it goes on with.
            overrides: settings in it that the command line gave.
            **more: how the run stands.
        """
        record = {
            "configuration": job.to_data(),
            "running": running.to_data(),
            "overrides": dict(overrides),
            "folder": str(job.model.folder),
            "seed": job.train.seed,
            "versions": _versions(),
            "commit": _commit(job.model.folder),
            "hardware": _describe_machine(job.hardware),
            **more,
        }
        partial = self.record.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.record)


def _given(value: Any) -> Any:
    """A setting without what is absent in it: a run of an earlier version has no key for what came later."""
    if not isinstance(value, dict):
        return value
    return {key: _given(entry) for key, entry in value.items() if entry is not None}


def _describe_machine(hardware: str) -> dict[str, Any]:
    """The planned hardware by name, and the machine that the run was started on."""
    return {
        "planned_for": hardware,
        "machine": platform.machine(),
        "system": platform.platform(),
        "num_cores": os.cpu_count(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit(folder: Path) -> str | None:
    """The commit that the job's folder is at, with a plus where files differ from it; None outside of git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
