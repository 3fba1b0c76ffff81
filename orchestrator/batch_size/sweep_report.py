"""What `lowtide batch-size --sweep` prints: a row a batch size, the fitted curve, the regions, the noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.batch_size.command import BatchSizeRequest
from orchestrator.batch_size.critical_batch import CriticalBatch, Regions, median_steps, regions
from orchestrator.batch_size.methods import Method, disagreements
from orchestrator.batch_size.report import (
    Said,
    disagreement_lines,
    is_adaptive,
    mean_noise,
    plain,
    recommendation,
    recommended_line,
)
from orchestrator.batch_size.results_file import SweepFound
from orchestrator.batch_size.sweep import at_edge, best_run, outcomes
from orchestrator.job import JobSpec
from orchestrator.metrics import finite
from planner.report.text_table import text_table


def sweep_report(
    request: BatchSizeRequest, found: SweepFound, fit: CriticalBatch, *, others: Sequence[Method]
) -> Said:
    """A row a batch size, the fitted curve with its intervals, the regions, the noise scale beside them."""
    job, seed = request.job, request.job.train.seed
    cut = regions(fit.b_crit)
    table = _table(found, fit, cut, seed=seed)
    recommended, why = _recommended(job, found, fit) if fit.reliable else (None, "")
    edges = at_edge(found.runs, first_seed=seed)
    disagree = disagreements(others, adaptive=is_adaptive(job))
    lines = [*_table_lines(table), *_fit_lines(fit), *_region_lines(fit, cut), *_noise_lines(found, fit)]
    if recommended is not None:
        lines.append(recommended_line(recommended, why))
    beyond = (
        f"the best one is the last one tried at batch {', '.join(map(str, edges))}: add --rates beyond it"
    )
    if edges:
        lines.append(f"rates                {beyond}")
    lines += disagreement_lines(disagree)
    payload = {
        "status": "reliable" if fit.reliable else "unreliable",
        "target_loss": found.target_loss,
        "fit": {key: plain(value) for key, value in asdict(fit).items()},
        "regions": {key: finite(value) for key, value in asdict(cut).items()},
        "table": table,
        "noise_scale_mean": mean_noise(found.noise, batch=found.noise_batch),
        "noise_scale_mean_over_steps": mean_noise(found.noise),
        "noise_scale": [point.model_dump() for point in found.noise],
        "recommended": recommended,
        "rates_at_edge": edges,
        "disagreements": disagree,
    }
    complaint = "" if fit.reliable else f"the critical batch is unreliable: {fit.reason}"
    if complaint and edges:  # steps at a wrong rate say nothing of the batch
        complaint += f"; but first mend the rates: {beyond}"
    return Said(int(not fit.reliable), payload, lines, complaint)


def _table(found: SweepFound, fit: CriticalBatch, cut: Regions, *, seed: int) -> list[dict[str, Any]]:
    """One object a batch size."""
    runs = outcomes(found.runs, first_seed=seed)
    table = []
    for median in median_steps(runs):
        best = best_run(found.runs, median.batch, first_seed=seed)
        table.append(
            {
                "batch": median.batch,
                "rate": None if best is None else best.rate,
                "steps": median.steps,
                "reached": median.reached,
                "seeds": [run.steps for run in runs if run.batch == median.batch],
                "examples": median.steps * median.batch,
                "fitted_steps": finite(fit.steps(median.batch)),
                "region": cut.of(median.batch),
            }
        )
    return table


def _table_lines(table: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in table:
        more = "" if row["reached"] else "> "
        fitted = row["fitted_steps"]
        cells.append(
            (
                str(row["batch"]),
                "" if row["rate"] is None else f"{row['rate']:.4g}",
                f"{more}{row['steps']:.0f}",
                f"{more}{row['examples']:.0f}",
                "inf" if fitted is None else f"{fitted:.1f}",
                row["region"],
            )
        )
    return text_table(("batch", "rate", "steps", "examples", "fitted", "region"), cells)


def _region_lines(fit: CriticalBatch, cut: Regions) -> list[str]:
    """Where the regions end; nothing where the runs lie in one of them."""
    if not 0 < fit.b_crit < math.inf:
        return []
    return [
        f"regions              perfect scaling up to {cut.perfect_until:.4g} (at most {cut.tolerance:.0%} more "
        f"examples than the least), maximal data parallelism from {cut.maximal_from:.4g} (at most "
        f"{cut.tolerance:.0%} more steps)"
    ]


def _noise_lines(found: SweepFound, fit: CriticalBatch) -> list[str]:
    """The noise scale along a run; nothing where it is not known."""
    mean, over_steps = mean_noise(found.noise, batch=found.noise_batch), mean_noise(found.noise)
    if mean is None:
        return []
    known = [point.value for point in found.noise if point.value is not None]
    times = f"; {mean / fit.b_crit:.2g} times the critical batch" if 0 < fit.b_crit < math.inf else ""
    return [
        f"noise scale          {mean:.4g} on the way (mean over progress; over steps {over_steps:.4g}), "
        f"{known[0]:.4g} at its start, {known[-1]:.4g} at its end{times}"
    ]


def _recommended(job: JobSpec, found: SweepFound, fit: CriticalBatch) -> tuple[dict[str, Any], str]:
    """The critical batch in whole micro-batches with the rate of the nearest that was tried, and what it costs."""
    seed = job.train.seed
    batch = _whole_batch(job, fit.b_crit)
    reached = {run.batch for run in outcomes(found.runs, first_seed=seed) if run.reached}
    near = min(reached, key=lambda size: abs(math.log(size / batch)))
    chosen = best_run(found.runs, near, first_seed=seed)
    assert chosen is not None
    more_steps, more_examples = fit.steps(batch) / fit.s_min, fit.examples(batch) / fit.e_min
    why = f"{more_steps:.2g} times the least steps, {more_examples:.2g} times the least examples"
    return recommendation(job, batch, near_batch=near, near_rate=chosen.rate), why


def _fit_lines(fit: CriticalBatch) -> list[str]:
    def line(name: str, value: float, interval: tuple[float, float], unit: str) -> str:
        return (
            f"{name:<20} {value:.4g} {unit}, {interval[0]:.4g} to {interval[1]:.4g} at {fit.confidence:.0%}"
        )

    censored = f", {fit.num_censored} more did not" if fit.num_censored else ""
    return [
        line("critical batch", fit.b_crit, fit.b_crit_interval, "examples"),
        line("least steps", fit.s_min, fit.s_min_interval, "steps"),
        line("least examples", fit.e_min, fit.e_min_interval, "examples"),
        f"fit                  {fit.num_reached} batch sizes reached the target{censored}; "
        f"scatter {fit.scatter:.1%}; {fit.reason}",
    ]


def _whole_batch(job: JobSpec, size: float) -> int:
    """The largest power-of-two multiple of what the job's workers compute at once, at most `size`.

    Below one of these, a power of two: the micro-batch has to be smaller.
    """
    unit = job.micro_batch * job.train.workers
    if size < unit:
        return 2 ** max(0, math.floor(math.log2(size)))
    return unit * 2 ** math.floor(math.log2(size / unit))
