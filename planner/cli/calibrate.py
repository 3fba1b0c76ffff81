"""`calibrate` as a command of typer: times of operations, taken on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cost_models.hardware import HOST
from planner.cli.answer import Answer
from planner.cli.request import AsJson, PicturePath, check_picture

if TYPE_CHECKING:
    from planner.calibrating.request import CalibrationRequest

Jobs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[JOB]...", help="Measure the operations of these; of standard networks if none."),
]
Folder = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where measurements are kept.")]
Visits = Annotated[int, typer.Option("--visits", min=1, max=1000, help="Times that each is measured.")]
Processes = Annotated[
    int,
    typer.Option(
        "--processes", min=1, max=256, help="That compute at the same time, as ranks of this machine."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Of each; the job's if not given, or 1.")
]
Batches = Annotated[
    str | None, typer.Option("--micro-batches", help="Measure the jobs at these sizes too: 4,8,16.")
]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
HardwareText = Annotated[
    str, typer.Option("--hardware", help="Name of the device for plans that are made elsewhere, or 'host'.")
]


def calibrate_command(
    running: Callable[[], Callable[[CalibrationRequest, bool], Answer]],
    *,
    guard: Callable[..., AbstractContextManager[None]],
    show: Callable[[Answer, bool], None],
) -> Callable[..., None]:
    """The command.

    Args:
        running: gives what measures; it loads torch.
        guard: turns what is raised into a sentence and an exit status.
        show: prints.
    """

    def calibrate(
        jobs: Jobs = None,
        out: Folder = Path("measurements"),
        visits: Visits = 3,
        processes: Processes = 1,
        threads: Threads = None,
        micro_batches: Batches = None,
        device: Device = "cpu",
        hardware: HardwareText = HOST,
        picture: PicturePath = None,
        quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """Measure what operations take on this device; an interrupted run goes on where it was."""
        with guard(as_json=as_json):
            from planner.calibrating.request import CalibrationRequest

            if picture is not None:
                check_picture(picture)
            request = CalibrationRequest(
                jobs=tuple(jobs or ()),
                folder=out,
                visits=visits,
                processes=processes,
                threads=threads,
                micro_batches=micro_batches,
                device=device,
                hardware=hardware,
                picture=picture,
            )
            show(running()(request, not quiet), as_json)

    return calibrate
