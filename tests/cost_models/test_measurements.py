"""Measured times as a file, and the cost model made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.hardware import load_hardware
from cost_models.measured import FittedRoofline, Measured
from cost_models.measurements import (
    MeasuredOperation,
    Measurements,
    Setting,
    Transfer,
    find_measurements,
    read_measurements,
)
from cost_models.roofline import Roofline
from cost_models.work import VIEW, Work

HERE = Setting(
    hardware="host", device="A Processor", driver="", torch_version="2.15.0", threads=1, processes=2
)
DEVICE = load_hardware("a100-40gb")


def work(moved_bytes: int, *, kind: str = "elementwise", operation: str = "") -> Work:
    return Work(0.0, moved_bytes, 0, "float32", kind, operation)  # type: ignore[arg-type]


def measured(what: Work, *visits_s: float) -> MeasuredOperation:
    return MeasuredOperation(
        visits_s=visits_s,
        flop=what.flop,
        read_bytes=what.read_bytes,
        written_bytes=what.written_bytes,
        dtype=what.dtype,
        kind=what.kind,
    )


def taken(**operations: MeasuredOperation) -> Measurements:
    return Measurements(setting=HERE, overhead_visits_s=(1e-6, 3e-6, 2e-6), operations=operations)


def test_a_file_reads_back_as_it_was_written(tmp_path: Path):
    path = tmp_path / HERE.file_name
    written = taken(add=measured(work(1 << 20), 1e-3, 3e-3, 2e-3))
    path.write_text(written.to_json())
    assert read_measurements(path) == written
    assert find_measurements(tmp_path, HERE) == written
    # The median of the visits; not the mean, which a disturbed visit moves.
    assert written.operations["add"].time_s == 2e-3
    assert written.overhead_s == 2e-6


def test_a_setting_is_named_by_what_users_change():
    assert HERE.file_name == "a-processor-torch-2.15.0-1-threads-2-processes.json"


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "Another"), ("torch_version", "2.11.0"), ("threads", 2), ("processes", 1), ("driver", "550")],
)
def test_measurements_of_another_setting_are_refused_with_the_difference(
    tmp_path: Path, field: str, value: object
):
    path = tmp_path / "some.json"
    path.write_text(taken(add=measured(work(1), 1.0)).to_json())
    with pytest.raises(ValueError, match=f"do not hold here: {field} is"):
        find_measurements(path, HERE.model_copy(update={field: value}))


def test_a_folder_without_this_setting_says_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match="lowtide calibrate"):
        find_measurements(tmp_path, HERE)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: "{", "json"),
        (lambda d: json.dumps([]), "object"),
        (lambda d: json.dumps(d | {"format": 2}), "format"),
        (lambda d: json.dumps(d | {"more": 1}), "more"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "setting"}), "setting"),
        (lambda d: json.dumps(d).replace("[0.5]", "[]"), "visits_s"),
        (lambda d: json.dumps(d).replace("[0.5]", "[-0.5]"), "visits_s"),
        (lambda d: json.dumps(d).replace("[0.5]", "[NaN]"), "visits_s"),
        (lambda d: json.dumps(d).replace("[0.5]", "[1e9]"), "visits_s"),
        (lambda d: json.dumps(d).replace('"elementwise"', '"magic"'), "kind"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, damage: object, sentence: str):
    path = tmp_path / "some.json"
    data = json.loads(taken(add=measured(work(1), 0.5)).to_json())
    path.write_text(damage(data))  # type: ignore[operator]
    with pytest.raises(ValueError, match="is no measurement file") as caught:
        read_measurements(path)
    assert sentence in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_a_measured_operation_takes_its_time_and_what_calls_it():
    add = work(1 << 20, operation="add")
    model = Measured(taken(add=measured(add, 1e-3)), DEVICE)
    assert model.time_s(add) == pytest.approx(1e-3 + 2e-6)
    assert model.time_s(VIEW) == pytest.approx(2e-6)
    assert model.is_measured(add)
    assert not model.is_measured(work(1 << 20, operation="other"))


def test_what_was_not_measured_takes_the_roofline_times_what_its_kind_and_size_showed():
    roofline = Roofline(DEVICE)
    small, large = work(1 << 24), work(1 << 30)
    # Small ones take 3 times what the roofline says, large ones twice.
    seen = (
        measured(small, 3 * roofline.time_s(small)),
        measured(large, 2 * roofline.time_s(large)),
    )
    fitted = FittedRoofline(roofline, seen)
    near_small, near_large = work(1 << 25), work(1 << 31)
    assert fitted.time_s(near_small) == pytest.approx(3 * roofline.time_s(near_small))
    assert fitted.time_s(near_large) == pytest.approx(2 * roofline.time_s(near_large))
    other = work(1 << 25, kind="reduction")
    assert fitted.time_s(other) == roofline.time_s(other)


def test_a_size_far_from_all_others_takes_after_the_nearest():
    roofline = Roofline(DEVICE)
    seen = work(1 << 24)
    far = work(1 << 36)
    fitted = FittedRoofline(roofline, (measured(seen, 3 * roofline.time_s(seen)),))
    assert fitted.correction(far) == pytest.approx(3.0)


def test_an_operation_says_nothing_about_itself_where_it_is_left_out():
    roofline = Roofline(DEVICE)
    one, two = (measured(work(1 << 24), factor * roofline.time_s(work(1 << 24))) for factor in (3.0, 5.0))
    assert FittedRoofline(roofline, (one, two)).without(one).correction(work(1 << 24)) == pytest.approx(5.0)


def test_the_measured_share_is_of_the_time():
    add, other = work(1 << 20, operation="add"), work(1 << 20, kind="reduction", operation="other")
    model = Measured(taken(add=measured(add, 1e-3)), DEVICE)
    share = model.time_s(add) / (model.time_s(add) + model.time_s(other))
    assert model.measured_share([add, other]) == pytest.approx(share)
    assert model.measured_share([]) == 1.0


def test_the_link_is_the_one_that_the_measured_reductions_fit():
    # Two ranks: t = 2 (10 us + size / (2 * 1 GB/s)) = 20 us + size / 1 GB/s; the smallest buffer counts as latency.
    sizes = (1 << 10, 1 << 22, 1 << 24)
    times = tuple(Transfer(size_bytes=s, time_s=20e-6 + (s if s > 1 << 20 else 0) / 1e9) for s in sizes)
    link = taken().model_copy(update={"all_reduce": times}).link()
    assert link is not None
    assert link.latency_s == pytest.approx(10e-6)
    assert link.bytes_per_s == pytest.approx(1e9)


def test_one_process_has_no_link():
    alone = taken().model_copy(update={"setting": HERE.model_copy(update={"processes": 1})})
    assert alone.link() is None


def test_what_an_operation_is_called_does_not_make_its_demand_another():
    assert work(1, operation="add") == work(1, operation="mul") == replace(work(1), operation="")
