"""The planner as a tool of its own: python -m planner JOB.yaml --budget 4GiB."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator

import typer

from planner.cli.answer import Answer, PrepareWorkload
from planner.cli.command import plan_command
from planner.inputs.workload import Workload

_INTERRUPTED = 130


def show(answer: Answer, as_json: bool) -> None:
    """Print an answer: results on stdout, the sentence on stderr."""
    if as_json:
        print(json.dumps(answer.payload))
    elif answer.lines:
        print("\n".join(answer.lines))
    if answer.complaint:
        print(f"lowtide: {answer.complaint}", file=sys.stderr)


def tell(line: str) -> None:
    """Say how far a long search is, where a person watches."""
    if sys.stderr.isatty():
        print(f"lowtide: {line}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep torch's profiler library (it reads this when torch is loaded) and its tracer off the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL + 1)


def _preparing() -> PrepareWorkload:
    from planner.prepare import prepare_workload  # torch takes seconds; a wrong job file is answered before

    return prepare_workload


@contextlib.contextmanager
def _guard(*, as_json: bool) -> Iterator[None]:
    """Turn what the command may raise into a sentence and a status: 2 bad usage, 130 Ctrl-C."""
    try:
        yield
    except ValueError as error:
        print(f"lowtide: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("lowtide: interrupted", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


def main() -> None:
    """Entry point of ``python -m planner``."""
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="lowtide: %(message)s", stream=sys.stderr)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command = plan_command(Workload.load, _preparing, guard=_guard, show=show, tell=tell)
    app.command(epilog="Example: python -m planner deploy/jobs/quickstart.yaml --budget 70% --json")(command)
    app(prog_name="python -m planner")


if __name__ == "__main__":
    main()
