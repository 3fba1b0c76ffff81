"""The setting of this machine, in which times are measured and for which they hold."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch.utils import collect_env

from cost_models.measurements import Setting


def setting_here(*, hardware: str, device: torch.device, threads: int, processes: int) -> Setting:
    """The setting of this machine.

    Args:
        hardware: name of the device as a job says it.
        device: that computes.
        threads: of one process.
        processes: that compute at the same time.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = collect_env.get_nvidia_driver_version(collect_env.run) or ""
    else:
        name, driver = _cpu_name(), ""
    return Setting(
        hardware=hardware,
        device=name,
        driver=driver,
        torch_version=torch.__version__,
        threads=threads,
        processes=processes,
    )


def _cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
