"""A run as MLflow shows it: settings once, numbers step by step, how it ended."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.metrics import Event
from orchestrator.scalars import scalars_of
from planner.inputs.strict import WorkloadError

_MOST_METRICS = 1000  # of one request
_MOST_PARAMS = 100
_MOST_CHARACTERS = 500


def check_mlflow(place: str) -> str:
    """Refuse what is no URI/EXPERIMENT, or holds what must not be written down; the message does not repeat it.

    Raises:
        ValueError: see above.
    """
    uri, _, experiment = place.rpartition("/")
    if not uri or not experiment:
        raise ValueError("must be URI/EXPERIMENT, such as http://127.0.0.1:5000/digits")
    try:
        parts = urlsplit(uri)
        has_secret = parts.password is not None or bool(parts.query)
    except ValueError as error:
        raise ValueError("must be URI/EXPERIMENT; the URI is none") from error
    if has_secret:
        raise ValueError(
            "holds a password or a query, which every file of the run would repeat; leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return place


def check_mlflow_installed(place: str) -> None:
    """Say so before the run where MLflow is named and not there.

    Raises:
        WorkloadError: it is not installed.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise WorkloadError(
            f"train.mlflow names {place}, but MLflow is not installed; install it with pip install "
            "'lowtide[mlflow]', or leave train.mlflow out"
        )


class MlflowRun:
    """Sends a run's numbers to an MLflow server or store; a continued run is one run there too.

    Args:
        place: URI/EXPERIMENT.
        name: of the run.
        settings: nested plain data.
        memory: file that remembers which run it is.
    """

    def __init__(self, place: str, *, name: str, settings: Mapping[str, Any], memory: Path) -> None:
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        uri, _, experiment = place.rpartition("/")
        self._client = MlflowClient(tracking_uri=uri)
        if memory.exists():
            self._id = memory.read_text(encoding="ascii").strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
        memory.write_text(self._id + "\n", encoding="ascii")
        self._log_settings(settings)

    def watch(self, events: Sequence[Event]) -> None:
        """Send their numbers in as few requests as MLflow allows."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now_ms, event["step"])
            for event in events
            for name, value in scalars_of(event).items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])

    def close(self, *, failed: bool) -> None:
        """Say how the run has ended."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")

    def _log_settings(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        params = [
            Param(name, str(value)[:_MOST_CHARACTERS]) for name, value in _flat(settings) if value is not None
        ]
        self._client.log_batch(self._id, params=params[:_MOST_PARAMS])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
