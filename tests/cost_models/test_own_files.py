"""Devices and clusters of one's own: files named where a name may stand."""

from pathlib import Path

import pytest

from cost_models import UnknownHardwareError, load_cluster, load_hardware, read_cluster
from tests.cost_models.test_hardware_files import GOOD_FILE

CLUSTER = """
device = "mine.toml"
devices_per_node = 1
[sources]
devices_per_node = "a"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(GOOD_FILE)
    (tmp_path / "ours.toml").write_text(CLUSTER)
    return tmp_path


def test_a_file_is_found_again_by_its_place(folder: Path):
    spec = load_hardware("mine.toml", folder=folder)
    assert (spec.name, spec.place) == ("mine", str(folder / "mine.toml"))
    assert load_hardware(spec.place) == spec


def test_clusters_name_files_beside_their_own(folder: Path):
    spec = load_hardware("mine.toml", folder=folder)
    assert load_cluster("ours.toml", folder=folder).device == spec
    inline = {"device": "mine.toml", "nodes": 1, "devices_per_node": 1}
    assert read_cluster(inline, folder=folder).device == spec


def test_a_file_may_not_take_the_name_of_a_known_device(folder: Path):
    (folder / "t4.toml").write_text(GOOD_FILE)
    with pytest.raises(
        ValueError, match=r"^t4\.toml: 't4' is the name of known hardware\. Rename the file\.$"
    ):
        load_hardware("t4.toml", folder=folder)


def test_a_file_that_is_not_there_is_said(folder: Path):
    with pytest.raises(
        ValueError, match=r"^there is no hardware file .*none\.toml\. Name one that is there\.$"
    ):
        load_hardware("none.toml", folder=folder)
    with pytest.raises(
        ValueError, match=r"^there is no cluster file .*none\.toml\. Name one that is there\.$"
    ):
        load_cluster("none.toml x2", folder=folder)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('kind = "gpu"', "kind = 3", r"^mine\.toml: kind must be text: got 3\.$"),
        (
            'memory_bytes = "a"',
            "memory_bytes = 3",
            r"^mine\.toml: sources\.memory_bytes must be text: got 3\.$",
        ),
        ('"PCIe"', "3", r"^mine\.toml: links\.host\.name must be text: got 3\.$"),
    ],
)
def test_what_is_no_text_is_refused(folder: Path, old: str, new: str, sentence: str):
    (folder / "mine.toml").write_text(GOOD_FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=sentence):
        load_hardware("mine.toml", folder=folder)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        UnknownHardwareError, match=r"'A100'\. Did you mean 'a100-40gb' or 'a100-80gb'\? Known"
    ):
        load_hardware("A100")
