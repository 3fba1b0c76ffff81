"""A run's numbers as gauges that Ray gives to Prometheus; set in an actor of the cluster, not in a rank."""

from __future__ import annotations

from typing import Any

from orchestrator.metrics import Event
from orchestrator.scalars import scalars_of

_RANK = "memory/rank_"


class RayGauges:
    """Gauges named `lowtide_...`, with the unit in the name and the tags `run` and, for memory, `rank`.

    Args:
        gauge: Ray's class.
        run: name of the run.
    """

    def __init__(self, gauge: Any, run: str) -> None:
        self._gauge = gauge
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, event: Event) -> None:
        """Set those that an event tells of."""
        for name, value in {**scalars_of(event), **_place(event)}.items():
            tags = {"run": self._run, "rank": ""}
            if name.startswith(_RANK):
                tags["rank"], _, what = name.removeprefix(_RANK).partition("_")
                name = f"memory/{what}"
            name = f"lowtide_{name.replace('/', '_')}"
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name, description=name, tag_keys=("run", "rank"))
            self._gauges[name].set(value, tags=tags)


def _place(event: Event) -> dict[str, float]:
    return {"step": float(event["step"])} if event["event"] == "step" else {}
