"""Tests that start a Ray cluster take turns, however many processes run the suite."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

# A cluster alone keeps two cores busy while it starts; three at once miss one another's deadlines.
_TURN = Path(tempfile.gettempdir()) / f"lowtide-tests-ray-{os.getuid()}.lock"


class TurnTaking:
    """Holds a lock between processes from the first test with Ray to the last of those in a row."""

    def __init__(self) -> None:
        self._held: int | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._held is None and _uses_ray(item):
            self._held = os.open(_TURN, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._held, fcntl.LOCK_EX)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> None:
        # Last, so that what the fixtures of a file have started is gone.
        if self._held is not None and not (nextitem and _uses_ray(nextitem)):
            fcntl.flock(self._held, fcntl.LOCK_UN)  # closing alone leaves it to forked children
            os.close(self._held)
            self._held = None


def _uses_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("ray") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TurnTaking())
