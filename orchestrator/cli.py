"""The command `lowtide`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.batch_size.command import batch_size_command
from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.job_commands import add_job_commands
from orchestrator.run_folder import RunFolder
from orchestrator.size_command import size_command
from planner.__main__ import quiet_libraries, show, tell
from planner.cli.answer import Answer, PrepareWorkload, explain_file
from planner.cli.calibrate import calibrate_command
from planner.cli.check import MakeReal, check_command
from planner.cli.command import plan_command
from planner.cli.request import AsJson, BudgetText, JobPath, PicturePath
from planner.errors import CompilerError, InfeasibleError, SolverError
from planner.inputs.workload import Workload
from planner.inputs.yaml_reader import read_yaml

if TYPE_CHECKING:
    from planner.calibrating.request import CalibrationRequest

app = typer.Typer(
    name="lowtide",
    help="Train PyTorch models inside a memory budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_INTERRUPTED = 130

Seed = Annotated[int | None, typer.Option(help="Replaces train.seed.")]
Steps = Annotated[int | None, typer.Option(help="Replaces train.steps.")]


@app.callback()
def _root() -> None:
    """Keep the verbs apart even where there is only one."""


@app.command(epilog="Example: lowtide train deploy/jobs/quickstart.yaml --budget 70%")
def train(
    job: JobPath,
    budget: BudgetText = None,
    address: Annotated[str | None, typer.Option(help="Join a Ray cluster: HOST:PORT, or auto.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue the run of this folder.")
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    seed: Seed = None,
    steps: Steps = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Replaces train.workers; a run that is continued keeps its global batch."),
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Replaces train.run_dir, where run folders are made.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Replaces train.backend: ray or local.")] = None,
) -> None:
    """Plan a job, train it, and leave a run folder."""
    with _answers(as_json=as_json):
        overrides = _given(
            budget=budget, seed=seed, steps=steps, workers=workers, run_dir=run_dir, backend=backend
        )
        if resume is not None:
            overrides = RunFolder.read_record(resume)["overrides"] | overrides
        spec = JobSpec.load(job).with_changes(overrides)
        # Training imports torch, which takes seconds; a wrong job file is answered before.
        from orchestrator.launch import Options
        from orchestrator.launch import train as train_job

        options = Options(
            job_path=str(job),
            address=address,
            resume=resume,
            json_lines=as_json,
            quiet=quiet,
            overrides=overrides,
        )
        status = train_job(spec, options)
        if status:
            raise typer.Exit(status)


def _load_job(path: Path) -> Workload:
    return JobSpec.load(path) if "train" in read_yaml(path) else Workload.load(path)


def _preparing() -> PrepareWorkload:
    # As above, torch is loaded only for a file that can be read.
    from orchestrator.planning import prepare_step

    return prepare_step


def _checking() -> MakeReal:
    from orchestrator.planning import check_step

    return check_step


def _given(**settings: str | int | None) -> dict[str, str | int]:
    """The settings that the command line gave."""
    return {key: value for key, value in settings.items() if value is not None}


@contextlib.contextmanager
def _answers(*, as_json: bool = False) -> Iterator[None]:
    """Turn what a command may raise into a sentence and a status: 1 no answer, 2 bad usage, 130 Ctrl-C."""
    try:
        yield
    except InfeasibleError as error:
        _leave(str(error), 1, as_json=as_json, smallest_feasible_bytes=error.smallest_feasible_bytes)
    except (SolverError, CompilerError) as error:
        _leave(str(error), 1, as_json=as_json)
    except RunFailedError as error:
        _leave(str(error), 2 if error.bad_input else 1, as_json=as_json)
    except ValueError as error:
        _leave(str(error), 2, as_json=as_json)
    except KeyboardInterrupt:
        _leave("interrupted", _INTERRUPTED, as_json=as_json)


def _leave(message: str, status: int, *, as_json: bool, **more: object) -> None:
    if as_json:
        typer.echo(json.dumps({"event": "error", "message": message, **more}))
    typer.echo(f"lowtide: {message}", err=True)
    raise typer.Exit(status)


@app.command(epilog="Example: lowtide explain plan.json --depth 2")
def explain(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="As `lowtide plan --out` wrote it.")],
    depth: Annotated[
        int | None, typer.Option(help="Parts of a layer's name to keep; without it the table is short.")
    ] = None,
    picture: PicturePath = None,
    as_json: AsJson = False,
) -> None:
    """Say what a plan retains and rematerializes in each layer, and what holds its peak."""
    with _answers(as_json=as_json):
        show(explain_file(plan, depth=depth, picture=picture), as_json)


add_job_commands(app, guard=_answers)


# Registered here, where its guard is known; the verbs are listed in this order.
app.command(
    "plan",
    epilog="Example: lowtide plan deploy/jobs/quickstart.yaml --budget 70% --hardware h100-sxm --out plan.json",
)(plan_command(_load_job, _preparing, guard=_answers, show=show, tell=tell))


app.command("check", epilog="Example: lowtide check deploy/jobs/quickstart.yaml --budget 70%")(
    check_command(_load_job, _checking, guard=_answers, show=show, tell=tell)
)


app.command(
    "size", epilog="Example: lowtide size deploy/jobs/quickstart.yaml --cluster 'host x2' --budget none"
)(size_command(guard=_answers, show=show, tell=tell))


def _calibrating() -> Callable[[CalibrationRequest, bool], Answer]:
    from orchestrator.calibrating import calibrate

    return calibrate


app.command("calibrate", epilog="Example: lowtide calibrate deploy/jobs/quickstart.yaml --processes 2")(
    calibrate_command(_calibrating, guard=_answers, show=show)
)


app.command("batch-size", epilog="Example: lowtide batch-size deploy/jobs/quickstart.yaml --time-limit 30s")(
    batch_size_command(guard=_answers, show=show)
)


def main() -> None:
    """Entry point of the console script."""
    quiet_libraries()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as above; the ranks' processes inherit it
    logging.basicConfig(
        level=logging.WARNING, format="lowtide: %(levelname)s: %(message)s", stream=sys.stderr
    )
    app()


if __name__ == "__main__":
    main()
