"""Measured times of operations as a file: where they were taken, and what each operation took there."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cost_models.device import LinkSpec
from cost_models.work import DTYPES, Work, WorkKind

# No clock that is used tells less than a nanosecond from nothing.
_Seconds = Annotated[float, Field(ge=1e-9, le=3600, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, strict=True)]

FORMAT: Final = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Setting(_Frozen):
    """Where times were taken; they hold nowhere else.

    Attributes:
        hardware: name of the device as a job says it, such as "host" or "a100-40gb".
        device: what the device calls itself.
        driver: version of its driver, "" for a CPU.
        torch_version: of torch.
        threads: that one process computes with.
        processes: that computed at the same time on this machine.
    """

    hardware: str
    device: str
    driver: str
    torch_version: str
    threads: _Count
    processes: _Count

    @property
    def file_name(self) -> str:
        """A name that differs wherever the setting does in what users change."""
        words = [self.device, f"torch-{self.torch_version}", f"{self.threads}-threads"]
        words += [f"{self.processes}-processes"]
        return re.sub(r"[^a-z0-9.]+", "-", "_".join(words).lower()).strip("-") + ".json"

    def difference(self, other: Setting) -> str:
        """The first field in which two settings differ, with both values; "" where there is none."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine!r} there and {theirs!r} here"
        return ""


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype; give one of {', '.join(DTYPES)}")
    return dtype


class MeasuredOperation(_Frozen):
    """One operation on one device.

    Attributes:
        visits_s: median seconds of each visit to it; the visits lie some time apart.
        flop: demand of the operation, as for `Work`.
        read_bytes: as for `Work`.
        written_bytes: as for `Work`.
        dtype: as for `Work`.
        kind: as for `Work`.
    """

    visits_s: Annotated[tuple[_Seconds, ...], Field(min_length=1)]
    flop: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    read_bytes: Annotated[int, Field(ge=0)]
    written_bytes: Annotated[int, Field(ge=0)]
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    kind: WorkKind

    @property
    def time_s(self) -> float:
        """Median over the visits, seconds."""
        return statistics.median(self.visits_s)

    @property
    def work(self) -> Work:
        """The demand, for a cost model."""
        return Work(self.flop, self.read_bytes, self.written_bytes, self.dtype, self.kind)


class Transfer(_Frozen):
    """One measured all-reduce.

    Attributes:
        size_bytes: buffer of one rank.
        time_s: median seconds.
    """

    size_bytes: _Count
    time_s: _Seconds


class Measurements(_Frozen):
    """Everything that was measured in one setting.

    Attributes:
        format: of the file.
        setting: where.
        overhead_visits_s: what a call, of a view too, takes in a step beyond its time alone, by visit.
        operations: line of an operation (`Work.operation`) -> its time.
        block_overheads_s: "fsdp", "fsdp_keep" -> what a block that ranks share takes beyond its computation and its
            messages; empty for one process.
        all_reduce: times of sums over the processes of the setting, by size; () for one process.
    """

    format: Literal[1] = FORMAT
    setting: Setting
    overhead_visits_s: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    operations: Mapping[str, MeasuredOperation] = Field(default_factory=dict)
    block_overheads_s: Mapping[str, Annotated[float, Field(ge=0, le=10)]] = Field(default_factory=dict)
    all_reduce: tuple[Transfer, ...] = ()

    @property
    def overhead_s(self) -> float:
        """Median over the visits, seconds a call."""
        return statistics.median(self.overhead_visits_s) if self.overhead_visits_s else 0.0

    def link(self) -> LinkSpec | None:
        """The link that the measured all-reduces fit, as a ring; None where none were measured.

        A ring over p ranks takes t = 2 (p - 1) (latency_s + size_bytes / (p bytes_per_s)): the latency is that of
        the smallest buffer, the bandwidth the median over the buffers above 1 MiB.
        """
        p = self.setting.processes
        rounds = 2 * (p - 1)
        large = [t for t in self.all_reduce if t.size_bytes > 1 << 20]
        if p == 1 or not large:
            return None
        least_s = min(t.time_s for t in self.all_reduce)
        rates = [rounds * t.size_bytes / (p * (t.time_s - least_s)) for t in large if t.time_s > least_s]
        if not rates:
            return None
        return LinkSpec("measured", statistics.median(rates), least_s / rounds)

    def to_json(self) -> str:
        """The content of a file."""
        return json.dumps(self.model_dump(), indent=1) + "\n"


def read_measurements(path: Path) -> Measurements:
    """The measurements of a file.

    Raises:
        ValueError: it cannot be read, is no measurement file, or holds an absurd number; one sentence.
    """
    advice = "Measure again with lowtide calibrate, into another file."
    try:
        return Measurements.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"the measurements {path} cannot be read: {error.strerror}. {advice}") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part)[:80] for part in first["loc"]) or "the file"
        got = "" if isinstance(first["input"], dict | list) else f", got {str(first['input'])[:40]!r}"
        raise ValueError(
            f"{path} is no measurement file: {at}: {first['msg'].lower()}{got}. {advice}"
        ) from error


def find_measurements(place: Path, setting: Setting) -> Measurements:
    """The measurements of a setting: in a file, or in the file of a folder that is named after the setting.

    Raises:
        ValueError: there are none, they are no measurements, or they were taken elsewhere.
    """
    try:
        path = place / setting.file_name if place.is_dir() else place
        is_there = path.exists()
    except OSError as error:
        raise ValueError(f"the measurements {str(place)[:80]} cannot be read: {error.strerror}.") from error
    if not is_there:
        raise ValueError(
            f"there are no measurements for this setting at {path}. Make them with lowtide calibrate "
            f"--processes {setting.processes}, or leave measurements out to plan with the roofline."
        )
    found = read_measurements(path)
    difference = found.setting.difference(setting)
    if difference:
        raise ValueError(
            f"the measurements of {path} do not hold here: {difference}. Measure here with lowtide calibrate."
        )
    return found
