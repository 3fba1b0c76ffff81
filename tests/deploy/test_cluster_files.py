"""The files that start a cluster: accepted by the tools that read them, and as safe as the README says."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from orchestrator.job import JobSpec
from tests.deploy.kuberay_fields import RayCluster, RayJob

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
CLUSTERS = [path for path in KUBERAY if path.name.startswith("ray-")]
MODELS = {"RayCluster": RayCluster, "RayJob": RayJob}
UNPRIVILEGED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def ray_resource(path: Path) -> dict[str, Any]:
    (found,) = (document for document in documents(path) if document["apiVersion"].startswith("ray.io/"))
    return found


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"] if resource["kind"] == "RayCluster" else resource["spec"]["rayClusterSpec"]


def ray_templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(resource)
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template in a KubeRay resource, the submitter's too."""
    submitter = resource["spec"].get("submitterPodTemplate")
    return ray_templates(resource) + ([submitter] if submitter else [])


def pinned() -> dict[str, Version]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


def validate(manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(manifest, validator.latest_version(), strict=True)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}


# Ray's launcher


def launcher_file() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())


def accept(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it talks to the cloud."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_the_launcher_accepts_its_file():
    prepared = accept(launcher_file())
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4


@pytest.mark.parametrize(
    "change",
    [{"max_worker": 3}, {"head_node_type": "boss"}, {"max_workers": 1}, {"docker": {"picture": "lowtide"}}],
)
def test_the_launcher_refuses_a_wrong_file(change: dict[str, Any]):
    with pytest.raises((ValueError, importlib.import_module("jsonschema").ValidationError)):
        accept({**launcher_file(), **change})


def test_the_launcher_hands_the_token_over_as_a_file_and_asks_for_it():
    config = launcher_file()
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "RAY_AUTH_TOKEN" not in (DEPLOY / "ray-cluster.yaml").read_text()
    (start,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start


# KubeRay


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_kuberay_resources_have_only_published_fields(path: Path):
    resource = ray_resource(path)
    MODELS[resource["kind"]].model_validate(resource)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("authOption",), {"mode": "token"}, "Extra inputs"),
        (("authOptions", "mode"), "tokens", "'disabled' or 'token'"),
        (("rayVersion",), "2.51.0", "needs rayVersion 2.52.0"),
        (("workerGroupSpecs", 0, "replicas"), 3, "minReplicas <= replicas"),
        (("workerGroupSpecs", 0, "groupName"), "GPU nodes", "match pattern"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "valid string"),
    ],
)
def test_the_model_of_kuberays_fields_can_refuse(place: tuple[Any, ...], value: Any, complaint: str):
    resource = copy.deepcopy(ray_resource(DEPLOY / "kuberay" / "ray-cluster.yaml"))
    part = resource["spec"]
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(ValueError, match=complaint):
        RayCluster.model_validate(resource)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_pod_templates_hold_to_kubernetes_schemas(path: Path):
    for template in templates(ray_resource(path)):
        validate(as_pod(template))


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_other_resources_hold_to_kubernetes_schemas(path: Path):
    others = [document for document in documents(path) if not document["apiVersion"].startswith("ray.io/")]
    for document in others:
        validate(document)
    if not others:
        pytest.skip("holds a KubeRay resource alone")


def test_kubernetes_schemas_refuse_a_misspelt_field():
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    (template, *_) = copy.deepcopy(templates(ray_resource(CLUSTERS[0])))
    template["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(validator.ValidationError, match="readOnlyRootFileSystem"):
        validate(as_pod(template))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_pod_is_unprivileged_and_bounded(path: Path):
    for template in templates(ray_resource(path)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == UNPRIVILEGED
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        claimed = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert claimed == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_cluster_asks_for_a_token_and_keeps_its_runs(path: Path):
    resource = ray_resource(path)
    assert cluster_spec(resource)["authOptions"] == {"mode": "token"}
    (claim,) = documents(DEPLOY / "kuberay" / "checkpoints.yaml")
    for template in ray_templates(resource):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        claimed = volumes["checkpoints"]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        mounts = {mount["name"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["checkpoints"]["mountPath"] == "/checkpoints"
    if resource["kind"] == "RayJob":
        assert "--run-dir /checkpoints" in resource["spec"]["entrypoint"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ranks_of_gpu_clusters_get_a_gpu_and_others_none(path: Path):
    (group,) = cluster_spec(ray_resource(path))["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == path.stem.endswith("-gpu")
    assert container["image"].endswith("-cpu") != path.stem.endswith("-gpu")


def test_the_jobs_that_kubernetes_starts_are_jobs_that_fit_their_cluster(tmp_path: Path):
    (config, job) = documents(DEPLOY / "kuberay" / "ray-job-gpu.yaml")
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    jobs = {
        "ray-job-gpu.yaml": tmp_path / "quickstart-gpu.yaml",
        "ray-job.yaml": DEPLOY / "jobs" / "quickstart.yaml",
    }
    for name, path in jobs.items():
        resource = ray_resource(DEPLOY / "kuberay" / name)
        words = resource["spec"]["entrypoint"].split()
        assert words[:2] == ["lowtide", "train"]
        assert Path(words[2]).name == path.name
        train = JobSpec.load(path).train
        (group,) = cluster_spec(resource)["workerGroupSpecs"]
        assert train.workers <= group["replicas"]
        assert (train.device == "cuda") == name.endswith("-gpu.yaml")
        assert train.backend == "ray"
    assert job["kind"] == "RayJob"


def test_the_gpu_jobs_model_and_data_are_a_module_of_the_image(tmp_path: Path):
    (config, _) = documents(DEPLOY / "kuberay" / "ray-job-gpu.yaml")
    (tmp_path / "job.yaml").write_text(config["data"]["quickstart-gpu.yaml"])
    code = (
        "from pathlib import Path; from orchestrator.job import JobSpec\n"
        f"job = JobSpec.load(Path({str(tmp_path / 'job.yaml')!r}))\n"
        "assert job.model.resolve().__name__ == 'ByteGPT'\n"
        "assert callable(job.loss_fn()) and callable(job.train.data.resolve())"
    )
    environment = {"PYTHONPATH": f"{DEPLOY / 'jobs'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


# The image


def hadolint() -> str:
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    return found


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [hadolint(), "--no-color", "--failure-threshold", "info", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_dockerfile_is_clean():
    done = lint(DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_an_unpinned_dockerfile_is_not(tmp_path: Path):
    text = (DEPLOY / "Dockerfile").read_text()
    path = tmp_path / "Dockerfile"
    path.write_text(text.replace("FROM python:${PYTHON}\n", "FROM python\n"))
    done = lint(path)
    assert done.returncode != 0
    assert "DL3006" in done.stdout


def test_the_image_is_slim_pinned_and_not_root():
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", text, flags=re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)) == {"python:${PYTHON}"}
    assert re.findall(r"^USER (.+)$", text, flags=re.MULTILINE) == ["1000:1000"]
    for installing in re.findall(r"pip (?:install|wheel).*?(?=\n[A-Z#])", text, flags=re.DOTALL):
        assert "--constraint" in installing or "PIP_CONSTRAINT" in text.partition(installing)[0]
    copied = {
        word for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE) for word in line.split()[:-1]
    }
    sent = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned()
    for text in project["dependencies"]:
        requirement = Requirement(text)
        name = requirement.name.lower()
        assert versions[name] in requirement.specifier, text


def test_the_image_and_the_manifests_name_one_ray():
    ray = pinned()["ray"]
    assert {Version(cluster_spec(ray_resource(path))["rayVersion"]) for path in CLUSTERS} == {ray}
