"""The folder of one run: plan.json, metrics.jsonl, checkpoints/, run.json, figures."""

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
_FIXED_TRAIN = ("data", "seed", "shuffle", "workers", "accumulation", "steps", "schedule", "clip_norm")
_FIXED_TRAIN += ("batch_norm", "average")
# What it may change, and is then planned anew for.
_PLANNED = ("budget", "hardware", "measurements", "executor", "solver")
_PLANNED_TRAIN = ("sharding", "planning", "device", "threads_per_worker")


class RunFolder:
    """Paths of a run's files, and its run.json.

    Args:
        path: of the folder, which exists.
        before: configuration of the run that is continued; None for a new one.
    """

    def __init__(self, path: Path, *, before: dict[str, Any] | None = None) -> None:
        self._before = before
        self.path = path.resolve()
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
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
            return {"configuration": record["configuration"], "overrides": record["overrides"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkloadError(f"--resume {path}: there is no run.json of an earlier run in it") from error

    @classmethod
    def reopen(cls, path: Path, job: JobSpec) -> RunFolder:
        """The folder of an earlier run of the same job.

        Raises:
            WorkloadError: it is none, or the job has changed in what a continued run must keep.
        """
        before = cls.read_record(path)["configuration"]
        now = job.to_data()
        changed = [key for key in _FIXED if _given(before.get(key)) != _given(now[key])]
        changed += [
            f"train.{key}" for key in _FIXED_TRAIN if before.get("train", {}).get(key) != now["train"][key]
        ]
        if changed:
            raise WorkloadError(
                f"--resume {path}: the job now differs in {', '.join(changed)}; undo that, "
                "or start a new run without --resume"
            )
        return cls(path, before=before)

    def was_planned_as(self, job: JobSpec) -> bool:
        """Whether this continues a run whose plan is the one that the job asks for."""
        if self._before is None:
            return False
        now, before, train = job.to_data(), self._before, self._before["train"]
        return all(before.get(key) == now[key] for key in _PLANNED) and all(
            train.get(key) == now["train"][key] for key in _PLANNED_TRAIN
        )

    def write_record(self, job: JobSpec, overrides: Mapping[str, Any], **more: Any) -> None:
        """Write run.json: what was run, with which versions, on what.

        Args:
            job: as it runs.
            overrides: settings in it that the command line gave.
            **more: how the run stands.
        """
        record = {
            "configuration": job.to_data(),
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
