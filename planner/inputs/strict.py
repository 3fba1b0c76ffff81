"""Input models that refuse unknown keys, and one sentence for what is wrong with an input."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

_TAGS = frozenset({"tensor", "list", "mapping", "spec", "callable", "range", "value"})


class WorkloadError(ValueError):
    """What the user wrote cannot be used; the message says what is wrong, what was got and what to do."""


class StrictModel(BaseModel):
    """A frozen model; a key it does not know is refused with the nearest key that it does know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and cls.model_config.get("extra") == "forbid":
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    raise ValueError(unknown_name("key", str(key), known))
        return data


def unknown_name(kind: str, got: str, known: list[str]) -> str:
    """One clause that names the nearest known name, or lists all of them when none is near."""
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.6)
    advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} {got!r}; {advice}"


def sentence(error: ValidationError, *, source: str) -> str:
    """The first fault of a validation error as one sentence, and how many more there are.

    Args:
        error: what pydantic raised.
        source: what was read, for example the file's path.

    Returns:
        "job.yaml: batch.inputs.shape: ... (got ...)".
    """
    faults = error.errors()
    fault = faults[0]
    where = ".".join(str(part) for part in fault["loc"] if part not in _TAGS)
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if fault["type"] == "missing":
        parent, _, key = where.rpartition(".")
        where, message = parent, f"the required key {key!r} is missing"
    elif fault["type"] != "value_error" and not isinstance(fault["input"], dict | list):
        message = f"{message[0].lower()}{message[1:]}, got {fault['input']!r}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{source}: {where + ': ' if where else ''}{message}{more}"
