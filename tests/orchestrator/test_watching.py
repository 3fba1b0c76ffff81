"""Who watches a run: TensorBoard always, MLflow where it is named; none of them slows or fails the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator import watching
from orchestrator.backends.ray_gauges import RayGauges
from orchestrator.metrics import Event
from orchestrator.mlflow_run import MlflowRun, check_mlflow
from orchestrator.scalars import scalars_of
from orchestrator.summary import summary_lines
from orchestrator.tensorboard_files import TensorboardFiles
from orchestrator.watching import Watchers

COMMAND = [sys.executable, "-m", "orchestrator.cli", "train"]


def step_event(step: int, **changes: Any) -> Event:
    return {
        "event": "step",
        "step": step,
        "loss": 1.0 / step,
        "learning_rate": 0.01,
        "samples_seen": 8 * step,
        "global_batch": 8,
        "samples_per_s": 100.0,
        "gradient_norm": None,
        "measured_peak_bytes": 3000,
        "measured_peak_bytes_by_rank": (2000, 3000),
        "predicted_peak_bytes": 4000,
        "noise_scale": None,
        "noise_scale_interval": (0.0, None),
        "noise_scale_by_group": (None,),
        **changes,
    }


class Listener:
    """Keeps what it hears; may hang or fail."""

    def __init__(self, *, hangs: threading.Event | None = None, fails: bool = False) -> None:
        self.heard: list[Event] = []
        self.ended: list[bool] = []
        self._hangs, self._fails = hangs, fails

    def watch(self, events: Sequence[Event]) -> None:
        if self._hangs is not None:
            self._hangs.wait(30)
        if self._fails:
            raise ConnectionError("the server\nis gone")
        self.heard += events

    def close(self, *, failed: bool) -> None:
        self.ended.append(failed)


def test_every_event_is_heard_in_its_order_and_then_the_end():
    listener, warnings = Listener(), []
    with Watchers({"a listener": lambda: listener}, warnings.append) as watchers:
        for step in range(1, 1001):
            watchers(step_event(step))
    assert [event["step"] for event in listener.heard] == list(range(1, 1001))
    assert listener.ended == [False]
    assert warnings == []


def test_a_run_that_fails_is_told_as_one_that_failed():
    listener = Listener()
    with pytest.raises(KeyboardInterrupt), Watchers({"a listener": lambda: listener}, print):
        raise KeyboardInterrupt
    assert listener.ended == [True]


def test_a_watcher_that_fails_is_one_warning_and_the_others_go_on():
    listener, warnings = Listener(), []

    def cannot_be_made() -> Listener:
        raise ModuleNotFoundError("No module named 'tensorboardX'")

    made = {"one": lambda: Listener(fails=True), "two": cannot_be_made, "three": lambda: listener}
    with Watchers(made, warnings.append) as watchers:
        for step in range(1, 101):
            watchers(step_event(step))
            time.sleep(0.001)
    assert sorted(warnings) == [
        "one is left out of the rest of the run: ConnectionError: the server is gone",
        "two is left out of the rest of the run: ModuleNotFoundError: No module named 'tensorboardX'",
    ]
    assert len(listener.heard) == 100


def test_a_watcher_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watching, "_MOST_WAITING", 50)
    monkeypatch.setattr(watching, "_CLOSE_S", 0.1)
    goes_on, warnings = threading.Event(), []
    with Watchers({"one": lambda: Listener(hangs=goes_on)}, warnings.append) as watchers:
        for step in range(1, 200):
            watchers(step_event(step))
    assert warnings == ["one is left out of the rest of the run: 50 events wait for it"]
    with Watchers({"two": lambda: Listener(hangs=goes_on)}, warnings.append) as watchers:
        watchers(step_event(1))
    assert warnings[1:] == ["two is left out of the rest of the run: it did not end in 0.1 seconds"]
    goes_on.set()


def test_measured_and_predicted_peaks_are_there_for_each_rank_and_what_is_unknown_is_left_out():
    found = scalars_of(step_event(4, loss=None))
    assert {name: value for name, value in found.items() if name.startswith("memory/")} == {
        "memory/rank_0_measured_peak_bytes": 2000,
        "memory/rank_0_predicted_peak_bytes": 4000,
        "memory/rank_1_measured_peak_bytes": 3000,
        "memory/rank_1_predicted_peak_bytes": 4000,
    }
    assert "train/loss" not in found
    assert not any(name.startswith("noise_scale/") for name in found)
    known = scalars_of(step_event(4, noise_scale=30.0, noise_scale_interval=(20.0, None)))
    assert known["noise_scale/samples"] == 30.0
    assert known["noise_scale/low_samples"] == 20.0
    assert "noise_scale/high_samples" not in known
    assert scalars_of({"event": "warning", "step": 0, "message": "x"}) == {}


class Gauge:
    """Keeps what Ray's own would give to Prometheus."""

    shown: ClassVar[dict[tuple[str, str, str], float]] = {}

    def __init__(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert tag_keys == ("run", "rank")
        self.name = name

    def set(self, value: float, *, tags: dict[str, str]) -> None:
        self.shown[self.name, tags["run"], tags["rank"]] = value


def test_gauges_for_prometheus_have_units_in_their_names_and_tags_for_run_and_rank():
    gauges = RayGauges(Gauge, "tiny-1")
    gauges.show({"event": "warning", "step": 0, "message": "x"})
    assert Gauge.shown == {}
    gauges.show(step_event(4))
    assert Gauge.shown["lowtide_step", "tiny-1", ""] == 4
    assert Gauge.shown["lowtide_train_samples_per_s", "tiny-1", ""] == 100
    assert Gauge.shown["lowtide_memory_measured_peak_bytes", "tiny-1", "1"] == 3000
    assert Gauge.shown["lowtide_memory_predicted_peak_bytes", "tiny-1", "0"] == 4000


def test_the_last_lines_of_a_run_say_the_peak_of_each_rank():
    summary = {
        **dict.fromkeys(("validation_before", "validation_after", "recommended_batch"), None),
        "recommended_because": "too short",
        "run_dir": "runs/x",
        "measured_peak_bytes_by_rank": [2048, 3072],
        "predicted_peak_bytes": 4096,
    }
    assert (
        "measured peak         2.00 KiB on rank 0, 3.00 KiB on rank 1; predicted 4.00 KiB"
        in summary_lines(summary)
    )


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> number, as TensorBoard would draw it: a start forgets what was after it."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = proto.Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            if event.HasField("session_log"):
                for points in found.values():
                    for step in [step for step in points if step >= event.step]:
                        del points[step]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_forgets_the_steps_that_a_restart_does_again(tmp_path: Path):
    files = TensorboardFiles(tmp_path / "tensorboard")
    files.watch([{"event": "started", "step": 0}, *(step_event(step) for step in range(1, 6))])
    files.watch([{"event": "started", "step": 3}, step_event(4, loss=9.0)])
    files.close(failed=False)
    losses = curves(tmp_path / "tensorboard")["train/loss"]
    assert losses == pytest.approx({1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 9.0})


def test_a_run_leaves_tensorboards_files_with_what_it_has_reported(write_job: Any):
    path = write_job(train={"workers": 2}, budget="1MiB")
    done = subprocess.run([*COMMAND, str(path), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    found = curves(Path(events[-1]["run_dir"]) / "tensorboard")
    assert found["train/loss"] == pytest.approx({event["step"]: event["loss"] for event in steps})
    for rank in (0, 1):
        peaks = {event["step"]: event["measured_peak_bytes_by_rank"][rank] for event in steps}
        assert found[f"memory/rank_{rank}_measured_peak_bytes"] == pytest.approx(peaks)
    assert set(found["memory/rank_1_predicted_peak_bytes"].values()) == {steps[0]["predicted_peak_bytes"]}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("digits", "must be URI/EXPERIMENT"),
        ("http://me:geheim@host:5000/digits", "holds a password or a query"),
        ("http://[geheim/digits", "must be URI/EXPERIMENT; the URI is none"),
    ],
)
def test_a_place_that_mlflow_cannot_use_is_refused_and_not_repeated(place: str, reason: str):
    with pytest.raises(ValueError, match=reason) as caught:
        check_mlflow(place)
    assert "geheim" not in str(caught.value)


def test_mlflow_that_is_named_but_not_installed_is_a_sentence(write_job: Any):
    path = write_job(train={"mlflow": "http://127.0.0.1:1/digits"})
    hide = "import sys; sys.modules['mlflow'] = None; from orchestrator.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "train", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "train.mlflow names http://127.0.0.1:1/digits, but MLflow is not installed" in done.stderr
    assert not (path.parent / "runs").exists()


def test_mlflow_has_the_numbers_and_settings_of_a_run_and_a_continued_one_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, memory = str(tmp_path / "store"), tmp_path / "mlflow-run.txt"

    def run(*events: Event, failed: bool) -> str:
        made = MlflowRun(f"{uri}/digits", name="tiny-1", settings={"train": {"steps": 9}}, memory=memory)
        made.watch(events)
        made.close(failed=failed)
        return memory.read_text().strip()

    first = run(step_event(1), step_event(2), failed=True)
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(first).info.status == "FAILED"
    assert run(step_event(3), failed=False) == first
    found = client.get_run(first)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "tiny-1"
    assert found.data.params == {"train.steps": "9"}
    history = client.get_metric_history(first, "memory/rank_1_measured_peak_bytes")
    assert [(point.step, point.value) for point in history] == [(step, 3000.0) for step in (1, 2, 3)]
