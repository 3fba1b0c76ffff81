"""What `calibrate` may be asked, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cost_models.hardware import load_hardware
from cost_models.host import num_processors

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class CalibrationRequest:
    """What the command line asked for.

    Attributes:
        jobs: whose operations are measured; () for those of standard networks.
        folder: that measurements are kept in.
        visits: times that each operation is measured.
        processes: that compute at the same time.
        threads: of each; None for the jobs'.
        micro_batches: sizes at which the jobs are measured besides their own, "4,8,16".
        device: that computes: "cpu" or "cuda".
        hardware: name that plans know the device by, or its own file.
        picture: file for a figure, or None.

    Raises:
        ValueError: something that cannot be done.
    """

    jobs: tuple[Path, ...]
    folder: Path
    visits: int
    processes: int
    threads: int | None
    micro_batches: str | None
    device: str
    hardware: str
    picture: Path | None

    def __post_init__(self) -> None:
        if self.device not in _DEVICES:
            raise ValueError(f"--device must be one of {', '.join(_DEVICES)}, got {self.device!r}.")
        if self.device == "cuda" and self.processes > 1:
            raise ValueError(
                f"--processes {self.processes} is for the CPU, whose cores share caches and memory. Leave it out."
            )
        if self.processes > num_processors():
            raise ValueError(
                f"--processes {self.processes} would share {num_processors()} processors and wait for each other. "
                f"Say at most {num_processors()}, or measure on a machine with more."
            )
        load_hardware(self.hardware)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is no folder. Name the folder of the measurements.")
        if self.micro_batches is not None and not self.jobs:
            raise ValueError("--micro-batches goes with a JOB. Name one, or leave it out.")
        _ = self.sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """The micro-batches as numbers."""
        words = [] if self.micro_batches is None else self.micro_batches.split(",")
        if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
            raise ValueError(
                f"--micro-batches must list whole numbers from 1, got {self.micro_batches!r}. Write 4,8,16."
            )
        return tuple(int(word) for word in words)
