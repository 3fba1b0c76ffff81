"""A Ray that does not start is said in a sentence."""

import importlib.util
from pathlib import Path

import pytest

from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec
from tests.orchestrator.test_sizing import gpt_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


def fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's start raises an error."""
    import ray

    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)


@pytest.mark.parametrize(
    "error", [Exception("The node timed out\nat startup."), OSError("The node timed out")]
)
def test_ray_that_does_not_start_is_a_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from orchestrator.backends.ray_connection import connected

    fails(error, monkeypatch)
    sentence = r"^a Ray cluster on this machine cannot be used: The node timed out$"
    with (
        pytest.raises(RunFailedError, match=sentence),
        connected(None, JobSpec.load(gpt_job(tmp_path))),
    ):
        pass


def test_a_mistake_of_ours_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from orchestrator.backends.ray_connection import connected

    fails(TypeError("init() got an unexpected argument"), monkeypatch)
    with pytest.raises(TypeError), connected(None, JobSpec.load(gpt_job(tmp_path))):
        pass
