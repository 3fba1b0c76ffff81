"""What is sent with a job, how its log is followed and shown, and what is said where the cluster refuses."""

from __future__ import annotations

import io
import json
import os
import resource
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import job_following, jobs
from orchestrator.cli import app
from orchestrator.failures import RunFailedError
from orchestrator.job_following import follow_log
from orchestrator.job_log import JobLog
from orchestrator.progress import Display
from orchestrator.ray_access import explain_refusal, use_token
from orchestrator.submission import Submission, parse_submission

NOTHING: dict[str, Any] = {
    "job_id": None, "environment": (), "metadata": (), "image": None, "num_cpus": None, "num_gpus": None,
    "memory": None, "resources": (),
}  # fmt: skip


def lowtide(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_submission_is_read_from_words():
    got = parse_submission(
        job_id="try-7", environment=["A=1", "B=x=y", "C="], metadata=["team=vision"], image=None, num_cpus=1.5,
        num_gpus=0, memory="2GiB", resources=["tpu=4", "big=0.5"],
    )  # fmt: skip
    assert got == Submission(
        job_id="try-7",
        environment={"A": "1", "B": "x=y", "C": ""},
        metadata={"team": "vision"},
        num_cpus=1.5,
        num_gpus=0,
        memory_bytes=2 << 30,
        resources={"tpu": 4.0, "big": 0.5},
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"environment": ["secret"]}, "--env must be NAME=VALUE, got a word without ="),
        ({"environment": ["=secret"]}, "got a word without a name"),
        ({"environment": ["A=1", "A=2"]}, "--env A is given twice"),
        ({"environment": ["1A=1"]}, "'1A' is not the name of a variable"),
        ({"environment": ["RAY_AUTH_TOKEN=secret"]}, "where others can read it"),
        ({"job_id": "a/b"}, "--id must be at most 100 letters"),
        ({"job_id": ""}, "--id must be"),
        ({"job_id": "x" * 101}, "--id must be"),
        ({"image": " "}, "--image is empty"),
        ({"num_cpus": -1}, "--entrypoint-num-cpus must be a number of at least 0, got -1"),
        ({"num_gpus": float("nan")}, "--entrypoint-num-gpus must be a number of at least 0, got nan"),
        ({"memory": "2"}, "has no unit"),
        ({"resources": ["tpu=many"]}, "--resources tpu must be a number, got 'many'"),
        ({"resources": ["tpu=0"]}, "--resources tpu must be more than 0"),
    ],
)
def test_a_wrong_submission_is_refused_and_no_secret_repeated(words: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_submission(**{**NOTHING, **words})
    assert "secret" not in str(caught.value)


class FakeClient:
    """Remembers what a job would be submitted with."""

    sent: dict[str, Any]

    def get_job_info(self, job_id: str) -> Any:
        raise RuntimeError("Request failed with status code 404: no such job.")

    def submit_job(self, **sent: Any) -> str:
        self.sent = sent
        return "raysubmit_1"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    pytest.importorskip("ray", reason="Ray is not installed")
    fake = FakeClient()
    monkeypatch.setattr(jobs, "_client", lambda address: fake)
    return fake


def test_a_head_that_takes_no_jobs_yet_is_asked_again(
    write_job: Any, client: FakeClient, monkeypatch: pytest.MonkeyPatch
):
    refusals = [
        RuntimeError("status code 500: No available agent to submit job, please try again later.")
    ] * 2
    send = client.submit_job
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)

    def refuse_twice(**sent: Any) -> str:
        if refusals:
            raise refusals.pop()
        return send(**sent)

    monkeypatch.setattr(client, "submit_job", refuse_twice)
    result = lowtide("submit", write_job(train={"backend": "ray"}), "--address", "http://a:1", "--no-wait")
    assert result.exit_code == 0, result.output
    assert result.stdout == "raysubmit_1\n"


def test_a_job_that_arrived_over_a_lost_connection_is_not_sent_again(
    write_job: Any, client: FakeClient, monkeypatch: pytest.MonkeyPatch
):
    sent: list[str] = []
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)

    def lose_the_answer(**words: Any) -> str:
        sent.append(words["submission_id"])
        raise ConnectionError("Remote end closed connection without response")

    monkeypatch.setattr(client, "submit_job", lose_the_answer)
    monkeypatch.setattr(jobs, "_find", lambda _, name: name if name in sent else None)
    result = lowtide("submit", write_job(train={"backend": "ray"}), "--address", "http://a:1", "--no-wait")
    assert result.exit_code == 0, result.output
    assert [result.stdout.strip()] == sent


def test_a_job_travels_with_its_folder_environment_resources_and_metadata(write_job: Any, client: FakeClient):
    result = lowtide(
        "submit", write_job(train={"backend": "ray"}), "--address", "http://a:1", "--no-wait", "--id", "mine",
        "--env", "A=1", "--metadata", "team=vision", "--entrypoint-num-cpus", "0.5", "--entrypoint-num-gpus", "1",
        "--entrypoint-memory", "1GiB", "--resources", "tpu=2", "--steps", "7",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == "raysubmit_1\n"
    place = client.sent.pop("runtime_env")
    assert place["working_dir"] == str(Path.cwd())
    assert place["env_vars"] == {"A": "1"}
    assert client.sent == {
        "entrypoint": 'lowtide train job.yaml --json --steps 7 --address auto --run-dir "$HOME/lowtide-runs"',
        "submission_id": "mine",
        "metadata": {"lowtide.batch": "4", "lowtide.steps": "7", "team": "vision"},
        "entrypoint_num_cpus": 0.5,
        "entrypoint_num_gpus": 1.0,
        "entrypoint_memory": 1 << 30,
        "entrypoint_resources": {"tpu": 2.0},
    }


def test_a_job_of_an_image_sends_no_folder(client: FakeClient):
    result = lowtide(
        "submit", "/opt/jobs/a job.yaml", "--image", "place/lowtide:1", "--address", "http://a:1", "--no-wait",
        "--run-dir", "/checkpoints",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert client.sent["runtime_env"] == {"image_uri": "place/lowtide:1"}
    assert client.sent["entrypoint"] == (
        "lowtide train '/opt/jobs/a job.yaml' --json --run-dir /checkpoints --address auto"
    )


def test_a_name_that_exists_is_refused_before_anything_is_sent(
    write_job: Any, client: FakeClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "get_job_info", lambda job_id: SimpleNamespace())
    result = lowtide("submit", write_job(), "--address", "http://a:1", "--id", "mine")
    assert result.exit_code == 2
    assert "has a job named 'mine' already; give another --id" in result.stderr
    assert not hasattr(client, "sent")


def test_what_the_cluster_refuses_is_one_sentence(
    write_job: Any, client: FakeClient, monkeypatch: pytest.MonkeyPatch
):
    trace = (
        'Request failed with status code 500: Traceback\n  File "x.py", line 1\nValueError: no such thing.\n.'
    )

    def refuse(**_: Any) -> str:
        raise RuntimeError(trace)

    monkeypatch.setattr(client, "submit_job", refuse)
    result = lowtide("submit", write_job(), "--address", "http://a:1")
    assert result.exit_code == 2
    assert result.stderr == "lowtide: http://a:1 refuses the job: ValueError: no such thing.\n"


@pytest.mark.parametrize("verb", ["submit", "train"])
def test_a_yaml_bomb_is_refused_at_once(tmp_path: Path, verb: str):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    before_kib, started_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    result = lowtide(verb, path, *(["--address", "http://127.0.0.1:1"] if verb == "submit" else []))
    assert result.exit_code == 2
    assert "line 2: aliases (*name) are not read" in result.stderr
    assert time.monotonic() - started_s < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


# Following


def info(status: str, message: str = "") -> Any:
    done = status in ("SUCCEEDED", "FAILED", "STOPPED")
    return SimpleNamespace(status=SimpleNamespace(value=status, is_terminal=lambda: done), message=message)


class FakeLog:
    """Connections to one log, each of which begins at its beginning and breaks where it is told to."""

    def __init__(self, *connections: list[str | Exception]) -> None:
        self._connections = iter(connections)

    async def connect(self) -> AsyncIterator[str]:
        for part in next(self._connections):
            if isinstance(part, Exception):
                raise part
            yield part


def follow(log: FakeLog, *infos: Any) -> tuple[str, list[str]]:
    """What was written and what was said."""
    written, said, answers = [], [], iter(infos)
    follow_log(
        log.connect,
        lambda: next(answers),
        write=written.append,
        say=said.append,
        lost="gone",
        again="come back",
    )
    return "".join(written), said


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_following, "_TRY_EVERY_S", 0.0)
    monkeypatch.setattr(job_following, "_POLL_S", 0.0)


def test_every_character_comes_once_over_lost_connections():
    lost = ConnectionResetError("reset")
    log = FakeLog(["ab", "cd", lost], [lost], ["abc", RuntimeError("closed")], ["a", "bcdefg", "hi"])
    assert follow(log, info("SUCCEEDED")) == ("abcdefghi", ["gone; trying again. The job goes on"])


def test_a_log_that_ends_before_its_job_is_read_again():
    log = FakeLog(["ab"], ["abc"], ["abcd"])
    assert follow(log, info("RUNNING"), info("RUNNING"), info("FAILED"))[0] == "abcd"


def test_a_silent_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_following, "_SILENCE_S", 0.05)

    class Silent(FakeLog):
        num_connections = 0

        async def connect(self) -> AsyncIterator[str]:
            self.num_connections += 1
            yield "ab"
            if self.num_connections == 1:
                import asyncio

                await asyncio.sleep(3600)
            yield "c"

    assert follow(Silent(), info("RUNNING"), info("SUCCEEDED"))[0] == "abc"


def test_why_a_job_waits_is_said_once(monkeypatch: pytest.MonkeyPatch):
    waits = info("PENDING", "It may be waiting\nfor resources.")
    _, said = follow(FakeLog([], [], ["x"]), waits, waits, info("SUCCEEDED"))
    assert said == ["It may be waiting for resources."]


def test_a_connection_that_stays_away_is_given_up_with_the_way_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_following, "_GIVE_UP_S", -1.0)
    with pytest.raises(RunFailedError, match=r"gone for .* minutes \(reset\)\. The job may go on: come back"):
        follow(FakeLog([ConnectionResetError("reset")]))


def test_a_job_that_is_not_known_any_more_ends_the_following():
    def unknown() -> Any:
        raise RunFailedError("the cluster knows no job 'x'", bad_input=True)

    with pytest.raises(RunFailedError, match="knows no job"):
        follow_log(FakeLog(["a"]).connect, unknown, write=print, say=print, lost="gone", again="")


def test_a_log_is_shown_as_train_shows_its_run(capsys: pytest.CaptureFixture[str]):
    step = {
        "event": "step", "step": 3, "loss": 0.5, "samples_per_s": 10.0, "measured_peak_bytes": None,
        "noise_scale": None, "global_batch": 8, "samples_seen": 24,
    }  # fmt: skip
    end = {
        "event": "end", "validation_before": 2.0, "validation_after": 1.0, "validated_step": 3, "run_dir": "/r",
        "recommended_batch": None, "recommended_because": "too few", "global_batch": 8,
        "measured_peak_bytes_by_rank": [],
    }  # fmt: skip
    text = (
        "2026-01-01 00:00:00,000\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "Running entrypoint for job a: lowtide train\n"
        "warning: a rank was lost\n"
        f'{json.dumps(step)}\n{json.dumps(end)}\n{{"event": "error", "message": "twice"}}\nlowtide: last words'
    )
    with Display(3, base_batch=8, quiet=False) as display:
        log = JobLog(display)
        for start in range(0, len(text), 7):
            log.take(text[start : start + 7])
        log.end()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "validation loss       2.0000 before, 1.0000 after step 3",
        "recommended batch     none: too few",
        "run folder            /r",
    ]
    assert err.splitlines() == [
        "warning: a rank was lost", "step 3/3  loss 0.5000  10 samples/s", "lowtide: last words"
    ]  # fmt: skip


# Refusals


@pytest.fixture
def answering() -> Iterator[Any]:
    """Start a server that gives every request one answer; returns its address."""
    servers = []

    def start(status: int, body: str) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_cluster_of_an_old_ray_is_named_with_both_versions(answering: Any):
    address = answering(200, json.dumps({"ray_version": "2.9.3", "version": "4"}))
    result = lowtide("list", "--address", address)
    assert result.exit_code == 2
    assert f"the cluster at {address} runs Ray 2.9.3, and lowtide needs 2.51 or newer" in result.stderr


def test_what_is_no_jobs_api_gets_a_sentence(answering: Any):
    pytest.importorskip("ray", reason="Ray is not installed")
    address = answering(404, "nothing here")
    result = lowtide("list", "--address", address)
    assert result.exit_code == 2
    assert f"no Ray Jobs API answers at {address}: " in result.stderr
    assert "Traceback" not in result.stderr


def test_rays_own_refusal_of_another_version_names_both():
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray._private.utils import check_version_info

    there = {"ray_version": "2.52.0", "python_version": "3.10.1"}
    with pytest.raises(RuntimeError) as caught:
        check_version_info(there, "node here")
    reason = explain_refusal(caught.value, io.BytesIO())
    assert reason.startswith("it runs Ray 2.52.0 on Python 3.10.1, and this process Ray ")
    assert "install the same here" in reason


@pytest.mark.parametrize(("content", "complaint"), [(None, "cannot be read"), (" \n", "is empty")])
def test_a_token_file_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, complaint: str
):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(RunFailedError, match=f"RAY_AUTH_TOKEN_PATH names .*token, which {complaint}"):
        use_token(to_join=True)


@pytest.mark.parametrize(("to_join", "mode"), [(False, "token"), (True, None)])
def test_the_token_at_home_is_shown_to_the_jobs_api_but_not_to_a_cluster_that_is_joined(
    to_join: bool, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Who joins with a token asks the cluster for it too, and one that has none, or another, is then cut off.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 48)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "unset again after the test")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    use_token(to_join=to_join)
    assert os.environ.get("RAY_AUTH_MODE") == mode
    reason = explain_refusal(RuntimeError("InvalidAuthToken: missing"), io.BytesIO())
    assert ("set RAY_AUTH_MODE=token" in reason) is to_join
