"""Where a benchmark ran and with which versions, where its inputs lie, and where its numbers go."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
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


def show(result: Mapping[str, object], out: Path | None) -> None:
    """Print what was measured, and keep the same in a file where one is named."""
    text = json.dumps(result, indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
