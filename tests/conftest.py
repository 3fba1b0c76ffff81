"""How the suite is shared by processes: a file goes to one of them, and all that start Ray clusters to the same."""

from __future__ import annotations

from typing import Any

import pytest

# A cluster keeps two cores busy while it starts; several at once miss one another's deadlines.
_ON_RAY = "tests/orchestrator/on_ray/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _ON_RAY if nodeid.startswith(_ON_RAY) else super()._split_scope(nodeid)

    return OneCluster(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_there = item.nodeid.startswith(_ON_RAY)
        if is_there != (item.get_closest_marker("ray") is not None):
            raise pytest.UsageError(
                f"{item.nodeid}: tests marked `ray` belong in {_ON_RAY}, and no others do"
            )
