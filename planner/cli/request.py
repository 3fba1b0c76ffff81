"""What `plan` may be asked: its options, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cost_models.hardware import load_hardware
from cost_models.units import parse_seconds
from planner.inputs.workload import SolverSpec, Workload, check_budget, parse_gap
from planner.solvers import solver_named
from planner.whole_file import check_writable

JobPath = Annotated[
    Path, typer.Argument(metavar="JOB", help="A job file, for example deploy/jobs/quickstart.yaml.")
]
OptionalJobPath = Annotated[
    Path | None, typer.Argument(metavar="JOB", help="A job file, for example deploy/jobs/quickstart.yaml.")
]
GraphPath = Annotated[
    Path | None,
    typer.Option("--graph", metavar="FILE", help="Plan a bare cost graph (JSON) in place of a job."),
]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="'4GiB', '60%', '50% of activations' or 'none'.")
]
HardwareName = Annotated[
    str | None, typer.Option("--hardware", help="Exact name of a device, a .toml file of one, or 'host'.")
]
OutPath = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the plan, or a graph's schedule, as JSON.")
]
PicturePath = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="Draw it: a name that ends in .png or .pdf.")
]
TimeLimit = Annotated[str | None, typer.Option("--time-limit", help="Of the solver, such as '20s'.")]
Gap = Annotated[
    str | None,
    typer.Option("--gap", help="Share of the step's time that may stay unproven: 0.2%; 0% for a graph."),
]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="Name of the algorithm; 'auto' combines them.")
]
ExecutorText = Annotated[
    str | None,
    typer.Option("--executor", help="'aten' runs what eager runs; 'inductor' compiles fused groups of it."),
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Find the Pareto front of peak against time over 12 budgets.")
]
SmallestBudget = Annotated[
    bool, typer.Option("--smallest", help="Find the smallest budget, and what holds it up.")
]
MaxBatch = Annotated[bool, typer.Option("--max-batch", help="Find the largest batch within --budget.")]
ExtraTime = Annotated[
    str | None, typer.Option("--extra-time", help="With --max-batch: '10%', or 'forward' for one forward.")
]
FreeOrder = Annotated[bool, typer.Option("--free-order", help="The order of the operations may change.")]
Minimize = Annotated[str | None, typer.Option("--minimize", help="time, or energy at the device's power.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]

_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asked for; None where it said nothing.

    Attributes:
        job: a job file, or None with a graph.
        graph: a bare graph's file.
        budget: replaces the job's.
        hardware: replaces the job's.
        out: file for the plan; none is written without a plan.
        picture: file for a figure.
        time_limit: replaces the job's.
        gap: replaces the job's.
        solver: replaces the job's.
        free_order: the order of the operations may change.
        minimize: "time" or "energy"; replaces the job's.
        executor: replaces the job's.
        sweep: find the Pareto front.
        smallest: find the smallest budget.
        max_batch: find the largest batch.
        extra_time: that the largest batch may take: "10%", or "forward".
    """

    job: Path | None = None
    graph: Path | None = None
    budget: str | None = None
    hardware: str | None = None
    out: Path | None = None
    picture: Path | None = None
    time_limit: str | None = None
    gap: str | None = None
    solver: str | None = None
    free_order: bool = False
    minimize: str | None = None
    executor: str | None = None
    sweep: bool = False
    smallest: bool = False
    max_batch: bool = False
    extra_time: str | None = None

    def __post_init__(self) -> None:
        if (self.job is None) == (self.graph is None):
            got = "both" if self.job is not None else "neither"
            raise ValueError(f"give a JOB file or --graph FILE, one of the two; got {got}.")
        if self.graph is not None and self.hardware is not None:
            raise ValueError(
                f"--hardware {self.hardware} has no meaning for a graph: its costs stand in its file. "
                "Leave it out."
            )
        self._check_question()
        if self.executor not in (None, "aten", "inductor"):
            raise ValueError(f"--executor must be aten or inductor, got {self.executor!r}.")
        if self.executor is not None and self.graph is not None:
            raise ValueError("--executor has no meaning for a graph: it is not executed. Leave it out.")
        if self.budget is not None:
            check_budget(self.budget)
        if self.hardware is not None:
            load_hardware(self.hardware)
        if self.time_limit is not None and not 0.0 < parse_seconds(self.time_limit) < float("inf"):
            raise ValueError(
                f"--time-limit must be more than 0 and finite, got {self.time_limit!r}. Write '20s'."
            )
        if self.gap is not None:
            parse_gap(self.gap)
        if self.out is not None:
            check_writable(self.out, option="--out")
        if self.picture is not None:
            check_picture(self.picture)
        check_apart({"JOB": self.job, "--graph": self.graph, "--out": self.out, "--picture": self.picture})

    def _check_question(self) -> None:
        """Raise ValueError where options do not go together."""
        asked = [f"--{name}" for name in ("sweep", "smallest") if getattr(self, name)]
        asked += ["--max-batch"] * self.max_batch
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are different questions. Ask one at a time.")
        if (self.sweep or self.smallest) and self.budget is not None:
            raise ValueError(f"{asked[0]} finds budgets itself. Leave out --budget.")
        if self.minimize not in (None, "time", "energy"):
            raise ValueError(f"--minimize must be one of time, energy, got {self.minimize!r}.")
        if self.minimize == "energy" and (asked or self.graph is not None):
            what = asked[0] if asked else "--graph"
            raise ValueError(f"--minimize energy is for the plan of a JOB; {what} knows costs in time alone.")
        if self.max_batch and self.graph is not None:
            raise ValueError("--max-batch needs a JOB: a graph does not say how it grows with the batch.")
        if self.extra_time is not None and not self.max_batch:
            raise ValueError(
                "--extra-time goes with --max-batch. Leave it out, or ask for the largest batch."
            )

    def changed(self, spec: SolverSpec) -> SolverSpec:
        """A job's solver with what the command line says."""
        given = {
            "time_limit": self.time_limit,
            "gap": self.gap,
            "name": self.solver,
            "free_order": self.free_order or None,
            "minimize": self.minimize,
        }
        data = spec.model_dump() | {key: value for key, value in given.items() if value is not None}
        if self.solver is not None:
            solver_named(self.solver, free_order=self.free_order)
        return SolverSpec.model_validate(data)

    def changed_workload(self, workload: Workload) -> Workload:
        """A job's workload with what the command line says."""
        solver = self.changed(workload.solver)
        asked = next((name for name in ("sweep", "smallest", "max_batch") if getattr(self, name)), None)
        if asked is not None and solver.minimize == "energy":
            raise ValueError(
                f"--{asked.replace('_', '-')} knows costs in time alone, but the job's solver.minimize is energy. "
                "Say --minimize time."
            )
        changes: dict[str, object] = {"solver": solver}
        for key in ("budget", "executor"):
            if getattr(self, key) is not None:
                changes[key] = getattr(self, key)
        if self.hardware is not None:
            # A file on the command line is relative to the working folder, one in a job to that of the job.
            changes["hardware"] = load_hardware(self.hardware).place
        return workload.model_copy(update=changes)


def check_apart(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError where two names are of one file: what is written would replace what is read.

    Args:
        files: option -> path, None where it was not given.
    """
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        first = seen.setdefault(path.resolve(), option)
        if first != option:
            raise ValueError(f"{first} and {option} are the same file, {path}. Name two files.")


def check_picture(path: Path) -> None:
    """Raise ValueError unless a picture can be written there."""
    if path.suffix not in _PICTURES:
        raise ValueError(f"--picture {path} must end in one of {', '.join(_PICTURES)}.")
    check_writable(path, option="--picture")
