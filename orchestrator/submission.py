"""What is sent with a job: its name, environment, resources and metadata, checked before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cost_models.units import parse_bytes

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Ray shows a job's environment to whoever may see the job, and keeps it.
_SECRET = ("RAY_AUTH_TOKEN",)


@dataclass(frozen=True)
class Submission:
    """How a job is submitted.

    Attributes:
        job_id: its name on the cluster; None lets Ray choose one.
        environment: variables of the command and of the ranks.
        metadata: words that the cluster keeps with the job.
        image: container image that the job runs in; the job file is then one of the image.
        num_cpus: of the node that runs the command itself, beside those of the ranks.
        num_gpus: the same.
        memory_bytes: the same.
        resources: custom ones of that node.

    Raises:
        ValueError: one of them cannot be used.
    """

    job_id: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory_bytes: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.job_id is not None and not _ID.fullmatch(self.job_id):
            raise ValueError(
                f"--id must be at most 100 letters, digits, '-', '_' and '.', and begin with a letter or digit, "
                f"got {self.job_id!r}"
            )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"--env: {name!r} is not the name of a variable; write NAME=VALUE")
            if name in _SECRET:
                raise ValueError(
                    f"--env {name}: Ray keeps a job's environment where others can read it; the nodes of the "
                    "cluster have the token already"
                )
        if self.image is not None and not self.image.strip():
            raise ValueError("--image is empty; give the name of a container image")
        for option, amount in (("cpus", self.num_cpus), ("gpus", self.num_gpus)):
            if amount is not None and not 0 <= amount < float("inf"):
                raise ValueError(f"--entrypoint-num-{option} must be a number of at least 0, got {amount:g}")
        for name, amount in self.resources.items():
            if not 0 < amount < float("inf"):
                raise ValueError(f"--resources {name} must be more than 0, got {amount:g}")


def parse_submission(
    *,
    job_id: str | None,
    environment: Iterable[str],
    metadata: Iterable[str],
    image: str | None,
    num_cpus: float | None,
    num_gpus: float | None,
    memory: str | None,
    resources: Iterable[str],
) -> Submission:
    """A submission from the words of a command line; see there.

    Args:
        job_id, image, num_cpus, num_gpus: as they are.
        environment, metadata: NAME=VALUE each.
        memory: bytes with a unit.
        resources: NAME=AMOUNT each.

    Raises:
        ValueError: a word cannot be read, or a name is given twice.
    """
    amounts = {}
    for name, text in _pairs(resources, option="--resources").items():
        try:
            amounts[name] = float(text)
        except ValueError as error:
            raise ValueError(f"--resources {name} must be a number, got {text!r}") from error
    return Submission(
        job_id=job_id,
        environment=_pairs(environment, option="--env"),
        metadata=_pairs(metadata, option="--metadata"),
        image=image,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        memory_bytes=None if memory is None else parse_bytes(memory),
        resources=amounts,
    )


def _pairs(words: Iterable[str], *, option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            # A word without a name may be a secret alone, so it is not shown.
            raise ValueError(f"{option} must be NAME=VALUE, got a word without {'a name' if equals else '='}")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        found[name] = value
    return found
