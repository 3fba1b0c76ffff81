"""Where a benchmark ran and with which versions, and where its inputs lie."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

INSTANCES = Path(__file__).resolve().parents[3] / "shared" / "instances"


def machine(*packages: str) -> dict[str, object]:
    """Cores, processor, Python, and the versions of some packages; "absent" where one is not installed."""
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }
