"""The fields of KubeRay's custom resources that deploy/kuberay uses, from its published field reference (v1.6).

KubeRay's own schemas come with its operator and not as a package that tests could install, so this model is
written by hand. It refuses every field that it does not name, and says nothing of the fields that it leaves out.
Pod templates are checked elsewhere, against Kubernetes' own schemas.
"""

# ruff: noqa: N815

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# RayVersion of a cluster with token authentication: Ray itself has it since then.
_FIRST_WITH_TOKENS = Version("2.52.0")
# A name that Kubernetes accepts for a service, which the operator derives from it with "-head-svc" behind.
_Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=50)]
_Count = Annotated[int, Field(strict=True, ge=0)]


def _is_version(text: str) -> str:
    Version(text)
    return text


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(_Part):
    mode: Literal["disabled", "token"] = "token"
    secretName: str | None = None
    enableK8sTokenAuth: bool = False


class _Group(_Part):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class HeadGroupSpec(_Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: bool | None = None


class WorkerGroupSpec(_Group):
    groupName: _Name
    replicas: _Count = 0
    minReplicas: _Count
    maxReplicas: _Count
    numOfHosts: _Count = 1

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("minReplicas <= replicas <= maxReplicas")
        return self


class RayClusterSpec(_Part):
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec] = []
    rayVersion: Annotated[str, AfterValidator(_is_version)]
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: dict[str, Any] | None = None
    authOptions: AuthOptions | None = None
    suspend: bool = False

    @model_validator(mode="after")
    def _ray_knows_tokens(self) -> Self:
        has_tokens = self.authOptions is not None and self.authOptions.mode == "token"
        if has_tokens and Version(self.rayVersion) < _FIRST_WITH_TOKENS:
            raise ValueError(f"authOptions.mode token needs rayVersion {_FIRST_WITH_TOKENS} or newer")
        return self


class RayJobSpec(_Part):
    entrypoint: str
    rayClusterSpec: RayClusterSpec | None = None
    clusterSelector: dict[str, str] | None = None
    runtimeEnvYAML: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    backoffLimit: _Count = 0
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: _Count = 0
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None

    @model_validator(mode="after")
    def _one_cluster(self) -> Self:
        if (self.rayClusterSpec is None) == (self.clusterSelector is None):
            raise ValueError("give rayClusterSpec or clusterSelector, one of them")
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished does nothing without shutdownAfterJobFinishes")
        return self


class _Resource(_Part):
    apiVersion: Literal["ray.io/v1"]
    metadata: dict[str, Any]

    @model_validator(mode="after")
    def _name_makes_a_service(self) -> Self:
        if not isinstance(self.metadata.get("name"), str) or len(self.metadata["name"]) > 50:
            raise ValueError("metadata.name: 1 to 50 characters")
        return self


class RayCluster(_Resource):
    kind: Literal["RayCluster"]
    spec: RayClusterSpec


class RayJob(_Resource):
    kind: Literal["RayJob"]
    spec: RayJobSpec
