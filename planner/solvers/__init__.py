"""Solvers: one algorithm a file, each a frozen dataclass with ``solve(problem) -> Solution``.

A file is a solver when it holds a class whose ``name`` is the file's; its fields are the solver's options.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

from planner.problem import Problem
from planner.solution import Solution

# Asked when a job or a command names none.
DEFAULT_SOLVER = "auto"


class Solver(Protocol):
    """One algorithm with its options."""

    name: ClassVar[str]

    def solve(self, problem: Problem) -> Solution:
        """Search for a schedule within the budget."""
        ...


@cache
def solver_names() -> tuple[str, ...]:
    """Every solver that there is, by its file's name."""
    return tuple(
        path.stem
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.stem in _class_names(ast.parse(path.read_text(encoding="utf-8")))
    )


def solver_named(name: str, **options: Any) -> Solver:
    """A solver by its name, with those of the options that it has.

    Args:
        name: one of `solver_names()`.
        options: such as ``time_limit_s`` (seconds), ``gap`` (share of the step's time), ``threads``.

    Returns:
        The solver.

    Raises:
        ValueError: there is no solver of that name.
    """
    if name not in solver_names():
        raise ValueError(f"there is no solver {name!r}. Choose one of: {', '.join(solver_names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    kind = next(kind for kind in vars(module).values() if getattr(kind, "name", None) == name)
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in options.items() if key in known})


def _class_names(tree: ast.Module) -> set[str]:
    """Values of ``name: ClassVar[str] = "..."`` in the classes of a file."""
    return {
        line.value.value
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for line in kind.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.target.id == "name"
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    }
