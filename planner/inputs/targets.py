"""Callables named in a file: "module:callable", or "file.py:callable" relative to the file that names it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from planner.inputs.strict import StrictModel, WorkloadError, unknown_name


class TargetSpec(StrictModel):
    """A callable by name, and the keyword arguments it is called with.

    A bare string stands for a target without keyword arguments. A file path is relative to the folder of the
    file that names it, which travels as the validation context `{"folder": Path}`, so that a job can be read
    again elsewhere.
    """

    target: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    _folder: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {"target": data} if isinstance(data, str) else data

    @field_validator("target")
    @classmethod
    def _two_parts(cls, target: str, info: ValidationInfo) -> str:
        module, colon, name = target.rpartition(":")
        if not (colon and module and name):
            raise ValueError(f"a target is written 'module:callable' or 'file.py:callable', got {target!r}")
        return target

    def model_post_init(self, context: Any) -> None:
        """Remember the folder that file targets are relative to."""
        if isinstance(context, dict) and "folder" in context:
            self._folder = Path(context["folder"])

    @property
    def folder(self) -> Path:
        """The folder that a file target is relative to."""
        return self._folder

    def resolve(self) -> Callable[..., Any]:
        """The named callable.

        Raises:
            WorkloadError: the module or file does not import, or has no such callable.
        """
        place, _, name = self.target.rpartition(":")
        if place.endswith(".py"):
            module = _import_file(self._folder / place, target=self.target)
        else:
            module = _import_module(place, target=self.target)
        found: Any = module
        for part in name.split("."):
            if not hasattr(found, part):
                public = [key for key in vars(module) if not key.startswith("_")]
                raise WorkloadError(f"target {self.target!r}: {unknown_name('name', name, public)}")
            found = getattr(found, part)
        if not callable(found):
            raise WorkloadError(f"target {self.target!r} is a {type(found).__name__}, not a callable")
        return found

    def call(self) -> Any:
        """What the callable returns for the given keyword arguments.

        Raises:
            WorkloadError: the arguments do not fit its signature, or it raises.
        """
        function = self.resolve()
        self._check_arguments(function)
        try:
            return function(**self.kwargs)
        except WorkloadError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise WorkloadError(
                f"target {self.target!r} failed: {_reason(error)}. Correct its kwargs"
            ) from error

    def as_function(self) -> Callable[..., Any]:
        """The callable with its keyword arguments bound; a class (a loss module, say) is instantiated."""
        function: Any = self.resolve()
        if inspect.isclass(function):
            return self.call()
        return functools.partial(function, **self.kwargs) if self.kwargs else function

    def _check_arguments(self, function: Callable[..., Any]) -> None:
        try:
            inspect.signature(function).bind(**self.kwargs)
        except TypeError as error:
            raise WorkloadError(f"target {self.target!r}: {error}. Correct its kwargs") from error
        except ValueError:
            return  # a builtin without a signature: the call itself will tell


def _import_module(name: str, *, target: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the module's own code may raise anything
        raise WorkloadError(_import_failure(target, error)) from error


def _import_file(path: Path, *, target: str) -> ModuleType:
    path = path.resolve()
    name = f"lowtide_target_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise WorkloadError(
            f"target {target!r}: there is no file {path}. File targets are relative to the job file"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a path ending in .py always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that a neighbour never shadows an installed package
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file's own code may raise anything
        del sys.modules[name]
        raise WorkloadError(_import_failure(target, error)) from error
    return module


def _import_failure(target: str, error: BaseException) -> str:
    return f"target {target!r} does not import: {_reason(error)}. Correct the name or install what it needs"


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
