"""Which cost model prices a step: measurements of this setting where there are some, else the roofline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cost_models.hardware import HOST, HardwareSpec, load_hardware
from cost_models.measured import Measured
from cost_models.measurements import find_measurements, read_measurements
from cost_models.roofline import Roofline
from planner.calibrating.setting import setting_here


def hardware_of(name: str) -> HardwareSpec:
    """The device of a name or file; of "host" what one process has, by torch's number of threads.

    Raises:
        ValueError: no device has this name, or the file is none of hardware.
    """
    spec = load_hardware(name)
    if spec.name != HOST or spec.num_cores is None:
        return spec
    share = spec.with_num_cores(min(spec.num_cores, torch.get_num_threads()))
    return dataclasses.replace(share, memory_bytes=spec.memory_bytes)


def cost_model_of(
    hardware: str, *, measurements: Path | None = None, device: str = "cpu", processes: int = 1
) -> Roofline | Measured:
    """The model that prices operations on a device.

    Args:
        hardware: exact name of a device, a file of one's own, or "host".
        measurements: file or folder that `lowtide calibrate` wrote; None prices with the roofline.
        device: type of the device that "host" stands for.
        processes: that compute at the same time on this machine.

    Raises:
        ValueError: unknown hardware, no measurements there, or measurements of another setting.
    """
    spec = hardware_of(hardware)
    if measurements is None:
        return Roofline(spec)
    if hardware == HOST:
        here = setting_here(
            hardware=hardware,
            device=torch.device(device),
            threads=torch.get_num_threads(),
            processes=processes,
        )
        return Measured(find_measurements(measurements, here), spec)
    if measurements.is_dir():
        raise ValueError(
            f"{measurements} is a folder; hardware {spec.name!r} is not this machine, so its measurements are "
            "found by file only. Name the file."
        )
    found = read_measurements(measurements)
    if found.setting.hardware != spec.name:
        raise ValueError(
            f"{measurements} was measured on {found.setting.hardware!r}, got hardware {spec.name!r}. "
            "Name the file of that device."
        )
    return Measured(found, spec)
