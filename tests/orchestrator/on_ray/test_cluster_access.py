"""A real head that asks for a token and speaks TLS: who gets in, what is written, what is said."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.orchestrator.conftest import job_writer
from tests.orchestrator.ray_head import Head, ray_head, short_folder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("cryptography") is None, reason="cryptography is not installed"
    ),
]

COMMAND = [sys.executable, "-m", "orchestrator.cli"]
OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass
class Place:
    """A head, the way to it, and what its user has."""

    head: Head
    address: str
    proxy: Any
    token: str
    home: Path
    work: Path
    tls: dict[str, str]
    authority: Path
    token_file: Path
    secrets_seen: list[int] = field(default_factory=list)

    def environment(self, token: str | None) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if name not in OURS}
        mine |= {"HOME": str(self.home), "SSL_CERT_FILE": str(self.authority), **self.tls}
        return mine if token is None else {**mine, "RAY_AUTH_TOKEN": token}

    def start(self, *words: str | Path, token: str | None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment(token), cwd=self.work,
        )  # fmt: skip

    def run(self, *words: str | Path, token: str | None) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, token=token)
        self.look_at_processes()
        out, err = process.communicate(timeout=180)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def look_at_processes(self) -> None:
        """Remember every process whose command line shows the token."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if self.token.encode() in words:
                    self.secrets_seen.append(int(entry.name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A head with a token and TLS on Ray's own ports, behind a proxy with TLS for its Jobs API."""
    import ray

    from tests.orchestrator.tls_proxy import make_certificates, tls_proxy

    home = tmp_path_factory.mktemp("h")
    work, files = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("certificates")
    certificates, token = (
        make_certificates(files, address=ray.util.get_node_ip_address()),
        secrets.token_hex(24),
    )
    token_file = files / "token"
    token_file.write_text(token)
    tls = {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(certificates.certificate),
        "RAY_TLS_SERVER_KEY": str(certificates.key),
        "RAY_TLS_CA_CERT": str(certificates.authority),
    }
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file), "HOME": str(home), **tls}
    with (
        short_folder() as folder,
        ray_head(folder, settings) as head,
        tls_proxy(("127.0.0.1", urlsplit(head.jobs).port or 0), certificates) as proxy,
    ):
        yield Place(
            head=head,
            address=f"https://127.0.0.1:{proxy.port}",
            proxy=proxy,
            token=token,
            home=home,
            work=work,
            tls=tls,
            authority=certificates.authority,
            token_file=token_file,
        )


def test_without_the_token_or_with_a_wrong_one_nobody_gets_in(place: Place):
    job = job_writer(place.work)(train={"backend": "ray"})
    without = place.run("submit", job, "--address", place.address, token=None)
    assert without.returncode == 2
    assert without.stderr == (
        f"lowtide: {place.address} asks for a token, and there is none here: set RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token\n"
    )
    wrong = place.run("list", "--address", place.address, token="0" * 48)
    assert wrong.returncode == 2
    assert f"{place.address} refuses the token in RAY_AUTH_TOKEN" in wrong.stderr
    joined = place.run("train", job, "--address", place.head.cluster, token="0" * 48)
    assert joined.returncode == 2, joined.stderr
    assert "cannot be used: InvalidAuthToken: Authentication token is missing or incorrect" in joined.stderr
    assert without.stdout == wrong.stdout == joined.stdout == ""
    assert not (place.work / "runs").exists()
    assert place.run("list", "--address", place.address, token=place.token).stdout == ""


def test_a_certificate_of_nobody_is_refused_with_a_sentence(place: Place):
    environment = place.environment(place.token)
    del environment["SSL_CERT_FILE"]
    done = subprocess.run(
        [*COMMAND, "list", "--address", place.address],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "certificate verify failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_is_followed_through_a_lost_connection_and_leaves_no_token_behind(place: Place):
    job = job_writer(place.work)(
        train={"backend": "ray", "steps": 300, "checkpoint_every": 100}, budget="1MiB"
    )
    there = place.work / "there"
    words = ["submit", job, "--address", place.address, "--run-dir", there, "--json", "--id", "mine"]
    words += ["--env", "LOWTIDE_TEST=7", "--env", "OMP_NUM_THREADS=1", "--metadata", "team=vision"]
    process = place.start(*words, "--entrypoint-num-cpus", "0.5", token=place.token)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith('{"event": "step", "step": 20,'):
            place.proxy.cut(for_s=3.0)
            place.look_at_processes()
    complaint = process.stderr.read() if process.stderr else ""
    assert process.wait() == 0, "".join(lines)[-2000:] + complaint
    events = [json.loads(line) for line in lines if line.startswith('{"event": ')]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 301))
    assert events[-1]["event"] == "end"
    assert f"{place.address} does not answer; trying again. The job goes on" in complaint

    again = place.run("submit", job, "--address", place.address, "--id", "mine", token=place.token)
    assert again.returncode == 2
    assert "has a job named 'mine' already" in again.stderr

    shown = place.run("logs", "mine", "--address", place.address, "--follow", token=place.token)
    assert shown.returncode == 0
    assert "step 300/300  loss" in shown.stderr
    assert [line.split("  ")[0] for line in shown.stdout.splitlines()] == [
        "validation loss", "recommended batch", "run folder"
    ]  # fmt: skip

    written = [path for top in (place.head.folder, place.home, place.work) for path in top.rglob("*")]
    files = [path for path in written if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    assert any("job-driver-mine" in path.name for path in files)
    assert [path for path in files if place.token.encode() in path.read_bytes()] == []
    assert place.secrets_seen == []


def test_more_workers_than_there_is_room_for_are_refused_and_nothing_is_made(place: Place):
    job = job_writer(place.work)(train={"backend": "ray", "workers": 64})
    runs = place.work / "none"
    done = place.run("train", job, "--address", place.head.cluster, "--run-dir", runs, token=place.token)
    assert done.returncode == 2, done.stderr
    assert (
        f"the job asks for 64 workers of 1 CPU each; the cluster at {place.head.cluster} has room for 2 (2 CPU on "
        "1 node), and no autoscaler that could add nodes. Lower train.workers or add nodes"
    ) in done.stderr
    assert not runs.exists()
    assert done.stdout == ""


def test_a_job_without_a_folder_of_its_own_takes_its_files_along(place: Place):
    """As KubeRay's RayJob starts it: the entry point names a file of the image, and no folder is sent."""
    job_writer(place.work)(train={"backend": "ray", "steps": 3})
    code = (
        "import sys, time; from ray.job_submission import JobSubmissionClient\n"
        f"client = JobSubmissionClient({place.head.jobs!r})\n"
        f"command = '{sys.executable} -m orchestrator.cli train {place.work / 'job.yaml'} --address auto'\n"
        f"name = client.submit_job(entrypoint=command + ' --run-dir {place.work / 'alone'} --json')\n"
        "while not client.get_job_status(name).is_terminal(): time.sleep(0.3)\n"
        "print(client.get_job_logs(name)); sys.exit(client.get_job_info(name).driver_exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
        env={**place.environment(place.token), "RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert '"finished": true' in done.stdout
