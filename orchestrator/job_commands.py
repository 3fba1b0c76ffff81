"""`submit`, `status`, `logs`, `stop` and `list` as commands of typer: jobs of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Annotated

import typer

from orchestrator import jobs
from orchestrator.job import JobSpec
from orchestrator.job_log import JobLog
from orchestrator.progress import Display
from orchestrator.submission import parse_submission
from planner.cli.request import AsJson, BudgetText, JobPath

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="As `lowtide submit` printed it.")]
JobsAddress = Annotated[
    str, typer.Option(metavar="URL", help="Of the cluster's Jobs API, such as http://127.0.0.1:8265.")
]
Name = Annotated[
    str | None, typer.Option("--id", metavar="NAME", help="Of the job; Ray chooses one if not given.")
]
Environment = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="For the job; kept by Ray, so never a secret."),
]
Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Kept with the job.")
]
Image = Annotated[
    str | None, typer.Option("--image", help="Container image of the job; JOB is then a path in it.")
]
EntrypointCpus = Annotated[
    float | None, typer.Option("--entrypoint-num-cpus", help="For the command itself, beside its ranks'.")
]
EntrypointGpus = Annotated[float | None, typer.Option("--entrypoint-num-gpus", help="The same.")]
EntrypointMemory = Annotated[
    str | None, typer.Option("--entrypoint-memory", metavar="SIZE", help="The same, such as 2GiB.")
]
EntrypointResources = Annotated[
    list[str] | None,
    typer.Option("--resources", metavar="NAME=AMOUNT", help="The same, for resources of your own."),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job's id and return.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Guard = Callable[..., AbstractContextManager[None]]


def add_job_commands(app: typer.Typer, *, guard: Guard) -> None:
    """Register the verbs.

    Args:
        app: of the command.
        guard: turns what is raised into a sentence and an exit status.
    """
    app.command(
        "submit", epilog="Example: lowtide submit deploy/jobs/quickstart.yaml --address http://127.0.0.1:8265"
    )(_submit_command(guard))

    @app.command(epilog="Example: lowtide status raysubmit_1a2b3c --address http://127.0.0.1:8265")
    def status(job_id: JobId, address: JobsAddress) -> None:
        """Print a submitted job's status."""
        with guard():
            typer.echo(jobs.status(job_id, address=address))

    @app.command(epilog="Example: lowtide logs raysubmit_1a2b3c --address http://127.0.0.1:8265 --follow")
    def logs(
        job_id: JobId,
        address: JobsAddress,
        follow: Annotated[
            bool,
            typer.Option("--follow", help="Until the job ends, as `submit` does; return its exit status."),
        ] = False,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        """Print what a submitted job has written."""
        with guard():
            if not follow:
                typer.echo(jobs.logs(job_id, address=address), nl=False)
                return
            length = jobs.length_of(job_id, address=address)
            raise typer.Exit(_follow(job_id, address, length=length, as_json=as_json, quiet=quiet))

    @app.command(epilog="Example: lowtide stop raysubmit_1a2b3c --address http://127.0.0.1:8265")
    def stop(job_id: JobId, address: JobsAddress) -> None:
        """Ask a submitted job to end."""
        with guard():
            asked = jobs.stop(job_id, address=address)
            typer.echo("stopping" if asked else "it had ended before")

    @app.command("list", epilog="Example: lowtide list --address http://127.0.0.1:8265")
    def list_jobs(address: JobsAddress) -> None:
        """Print every submitted job: id, status, command."""
        with guard():
            for row in jobs.list_jobs(address=address):
                typer.echo("\t".join(row))


def _submit_command(guard: Guard) -> Callable[..., None]:
    def submit(
        job: JobPath,
        address: JobsAddress,
        budget: BudgetText = None,
        seed: Annotated[int | None, typer.Option(help="Replaces train.seed.")] = None,
        steps: Annotated[int | None, typer.Option(help="Replaces train.steps.")] = None,
        run_dir: Annotated[
            str | None,
            typer.Option(help="On the cluster; run folders are made in it. ~/lowtide-runs if not given."),
        ] = None,
        job_id: Name = None,
        env: Environment = None,
        metadata: Metadata = None,
        image: Image = None,
        entrypoint_num_cpus: EntrypointCpus = None,
        entrypoint_num_gpus: EntrypointGpus = None,
        entrypoint_memory: EntrypointMemory = None,
        resources: EntrypointResources = None,
        no_wait: NoWait = False,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        """Train a job on a cluster, follow it as `train` does, and return its exit status."""
        with guard():
            submission = parse_submission(
                job_id=job_id,
                environment=env or (),
                metadata=metadata or (),
                image=image,
                num_cpus=entrypoint_num_cpus,
                num_gpus=entrypoint_num_gpus,
                memory=entrypoint_memory,
                resources=resources or (),
            )
            settings = {"budget": budget, "seed": seed, "steps": steps, "run_dir": run_dir}
            overrides = {key: value for key, value in settings.items() if value is not None}
            arguments = [
                word
                for key, value in overrides.items()
                for word in (f"--{key.replace('_', '-')}", str(value))
            ]
            backend, length = "ray", {} if steps is None else {"steps": steps}
            if image is None:  # else the file is not here
                read = JobSpec.load(job).with_changes(overrides)
                backend, length = read.train.backend, {"steps": read.train.steps, "batch": read.base_batch}
            if backend == "ray":  # train on the cluster that runs the job, not on a new one
                arguments += ["--address", "auto"]
            name = jobs.submit(
                job, address=address, arguments=arguments, length=length, submission=submission
            )
            if no_wait:
                typer.echo(name)
                return
            typer.echo(
                f"job {name}; it goes on without this command: lowtide logs {name} --address {address} --follow",
                err=True,
            )
            raise typer.Exit(_follow(name, address, length=length, as_json=as_json, quiet=quiet))

    return submit


def _follow(job_id: str, address: str, *, length: Mapping[str, int], as_json: bool, quiet: bool) -> int:
    """Show a job's log until it ends; its exit status."""
    if as_json:
        say = _say_nothing if quiet else _say
        return jobs.follow(job_id, address=address, write=_pass_on, say=say)
    display = Display(length.get("steps"), base_batch=length.get("batch"), quiet=quiet)
    with display, _ended(JobLog(display)) as log:
        return jobs.follow(job_id, address=address, write=log.take, say=display.warn)


@contextlib.contextmanager
def _ended(log: JobLog) -> Iterator[JobLog]:
    try:
        yield log
    finally:
        log.end()


def _pass_on(text: str) -> None:
    typer.echo(text, nl=False)


def _say(text: str) -> None:
    typer.echo(f"lowtide: {text}", err=True)


def _say_nothing(_: str) -> None:
    pass
