"""What `lowtide batch-size` prints of a probe and of branches, and the same as one object."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.batch_size.branched import TOLERANCE, Branches, implied_critical_batch
from orchestrator.batch_size.command import BatchSizeRequest
from orchestrator.batch_size.critical_batch import CriticalBatch
from orchestrator.batch_size.methods import (
    Method,
    branched_method,
    disagreements,
    noise_method,
    sweep_method,
)
from orchestrator.batch_size.noise_scale import NoiseScale, recommended_batch
from orchestrator.batch_size.rate_rule import rate_factor_of, rate_rule
from orchestrator.batch_size.results_file import BranchesFound, Found, Noise
from orchestrator.batch_size.sweep import best_run
from orchestrator.job import JobSpec
from orchestrator.metrics import finite
from planner.report.text_table import text_table


@dataclass(frozen=True)
class Said:
    """An answer in words and as an object.

    Attributes:
        status: 0, or 1 where the question has no answer.
        payload: for ``--json``.
        lines: for people.
        complaint: why there is no answer, "" where there is one.
    """

    status: int
    payload: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    complaint: str = ""

    @classmethod
    def failed(cls, sentence: str) -> Said:
        """No answer."""
        return cls(1, {"status": "failed", "message": sentence}, complaint=sentence)


def methods_of(
    found: Found, fit: CriticalBatch | None, branches: Branches | None, *, job: JobSpec
) -> list[Method]:
    """What each method that has been used says of the critical batch."""
    methods = []
    if found.probe is not None and found.probe.noise.reliable:
        noise = found.probe.noise
        methods.append(noise_method(noise.low, _bound(noise.high), where=f"at step {noise.step}"))
    if found.sweep is not None and found.sweep.noise:
        mean = mean_noise(found.sweep.noise, batch=found.sweep.noise_batch)
        if mean is not None:
            methods.append(noise_method(mean, mean, where="on the way to the target"))
    if fit is not None:
        methods.append(sweep_method(*fit.b_crit_interval))
    if found.branched is not None and branches is not None:
        batch = found.branched.batch
        low = implied_critical_batch(batch, branches.factor)
        high = math.inf if branches.lost_at is None else implied_critical_batch(batch, branches.lost_at)
        rate = next(run.rate for run in found.branched.runs if run.factor == 1)
        best = _best_rate(found, batch, job)
        methods.append(
            branched_method(low, high, batch=batch, factor=branches.factor, rate=rate, best_rate=best)
        )
    return methods


def _best_rate(found: Found, batch: int, job: JobSpec) -> float | None:
    """The best rate at a batch by the nearest one of the sweep and the rule; None without a sweep."""
    runs = () if found.sweep is None else found.sweep.runs
    reached = {run.batch for run in runs if run.outcome == "reached" and run.seed == job.train.seed}
    if not reached:
        return None
    near = min(reached, key=lambda size: abs(math.log(size / batch)))
    best = best_run(runs, near, first_seed=job.train.seed)
    assert best is not None
    return best.rate * rate_factor_of(batch / near, rate_rule(job.optimizer.name))


def _bound(value: float | None) -> float:
    return math.inf if value is None else value


def mean_noise(points: Sequence[Noise], *, batch: int | None = None) -> float | None:
    """Mean of B_simple along a run, from the points where it is known; None where it nowhere is.

    Each point stands for the steps from half-way to the one before it to half-way to the one after it. A step at
    batch B makes 1 / (1 + B_noise / B) of the progress of one at an infinite batch, and the critical batch of a run
    at a fixed batch is the mean of B_noise over progress, so with w the steps of a point

        mean = sum w B_i / (1 + B_i / B)  /  sum w / (1 + B_i / B)

    Args:
        points: along the run.
        batch: B, that the run was made at; None for the plain mean over steps, in which the noisiest part, where
            each step does least, counts most.

    Reference: McCandlish et al., 2018, arXiv 1812.06162, equation 2.5 and appendix D.
    """
    known = [(point.step, point.value) for point in points if point.value is not None and point.value > 0]
    if not known:
        return None
    steps = [step for step, _ in known]
    edges = [steps[0], *((a + b) / 2 for a, b in itertools.pairwise(steps)), steps[-1]]
    weights = [b - a for a, b in itertools.pairwise(edges)]
    if batch is not None:
        weights = [weight / (1 + value / batch) for weight, (_, value) in zip(weights, known)]
    total = sum(weights)
    if total == 0:
        return known[0][1]
    return sum(weight * value for weight, (_, value) in zip(weights, known)) / total


def recommendation(job: JobSpec, batch: int, *, near_batch: int, near_rate: float) -> dict[str, Any]:
    """A batch, and the rate that the optimizer's rule makes of one that is known to be good."""
    rule = rate_rule(job.optimizer.name)
    rate = near_rate * rate_factor_of(batch / near_batch, rule)
    return {"batch": batch, "rate": rate, "rule": rule, "from_batch": near_batch, "from_rate": near_rate}


def recommended_line(found: dict[str, Any], because: str) -> str:
    """The same in words."""
    same = found["batch"] == found["from_batch"]
    how = "" if same else f" ({found['rule']} from {found['from_rate']:.4g} at {found['from_batch']})"
    return f"recommended          batch {found['batch']}, rate {found['rate']:.4g}{how}: {because}"


def disagreement_lines(sentences: Sequence[str]) -> list[str]:
    """A line for each."""
    return [f"disagreement         {sentence}" for sentence in sentences]


def is_adaptive(job: JobSpec) -> bool:
    """Whether the job's optimizer is Adam-like, for which the noise scale says little."""
    return rate_rule(job.optimizer.name) == "square root"


def probe_report(
    request: BatchSizeRequest,
    scale: NoiseScale,
    noise: Noise,
    *,
    rate: float,
    others: Sequence[Method],
) -> Said:
    """The estimate, its interval, the verdict, what follows, and what to run next."""
    job = request.job
    advice = recommended_batch(scale, multiple_of=job.micro_batch * job.train.workers)
    low, high = scale.interval
    value = "unknown" if math.isnan(scale.value) else f"{scale.value:.4g}"
    verdict = "reliable" if scale.reliable else "unreliable"
    lines = [
        f"noise scale          {value} examples, {low:.4g} to {high:.4g} at 95 %, at step {noise.step} "
        f"(loss {noise.loss:.4g})",
        f"verdict              {verdict}: {scale.reason}",
    ]
    recommended = None
    if advice.batch is not None:
        recommended = recommendation(job, advice.batch, near_batch=job.global_batch, near_rate=rate)
        lines.append(recommended_line(recommended, f"now batch {job.global_batch}; {advice.reason}"))
    disagree = disagreements(others, adaptive=is_adaptive(job))
    following = _next_of_probe(request, scale, noise)
    lines += disagreement_lines(disagree)
    lines += [f"next                 {line}" for line in following]
    payload = {
        "status": verdict,
        "noise_scale": noise.model_dump(),
        "global_batch": job.global_batch,
        "recommended": recommended,
        "disagreements": disagree,
        "next": following,
    }
    complaint = "" if scale.reliable else f"the noise scale is unreliable: {scale.reason}"
    return Said(int(not scale.reliable), payload, lines, complaint)


def _next_of_probe(request: BatchSizeRequest, scale: NoiseScale, noise: Noise) -> list[str]:
    command = f"lowtide batch-size {request.path}"
    following = []
    if not scale.reliable:
        following.append(f"{command} --time-limit {4 * request.time_limit_s:g}s")
    if request.checkpoint is None:
        following.append(
            f"lowtide train {request.path}, then {command} --checkpoint RUN_DIR: the noise grows as the loss "
            "falls"
        )
    if is_adaptive(request.job):
        following.append(
            f"{command} --branched --checkpoint RUN_DIR: with {request.job.optimizer.name} the noise scale may be "
            "far too small"
        )
    if request.checkpoint is not None:
        following.append(f"{command} --sweep --target-loss {noise.loss:.2g}")
    else:
        # The loss of now is reached within a few steps, which say nothing of how steps depend on the batch.
        following.append(
            f"{command} --sweep --target-loss LOSS: one the job reaches, far below {noise.loss:.2g}"
        )
    return following


def plain(value: Any) -> Any:
    """What JSON can hold: None for an infinity."""
    if isinstance(value, tuple):
        return [finite(part) for part in value]
    return finite(value) if isinstance(value, float) else value


def branched_report(
    request: BatchSizeRequest,
    found: BranchesFound,
    branches: Branches,
    *,
    others: Sequence[Method],
    rate: float,
) -> Said:
    """A row a factor, the largest that loses nothing, and what follows."""
    job, rule = request.job, rate_rule(request.job.optimizer.name)
    cells = [
        (
            f"{branch.factor}",
            f"{branch.factor * found.batch}",
            f"{rate * rate_factor_of(branch.factor, rule):.4g}",
            f"{branch.lost_share:+.1%}",
            f"{branch.bound_share:.1%}",
            branch.verdict,
        )
        for branch in branches.branches
    ]
    lines = text_table(("factor", "batch", "rate", "progress lost", "at most", "verdict"), cells)
    batch = branches.factor * found.batch
    end = "no larger one was tried" if branches.lost_at is None else f"{branches.lost_at} is not shown to"
    lines.append(
        f"largest factor       {branches.factor}, batch {batch}, loses nothing of the {branches.fall:.4g} by which "
        f"the loss falls from step {found.step} within {found.window} steps (at most {TOLERANCE:.0%}, one-sided "
        f"95 %); {end}"
    )
    recommended = recommendation(job, batch, near_batch=found.batch, near_rate=rate)
    lines.append(recommended_line(recommended, f"from step {found.step} on"))
    disagree = disagreements(others, adaptive=is_adaptive(job))
    lines += disagreement_lines(disagree)
    payload = {
        "status": "found",
        "factor": branches.factor,
        "lost_at": branches.lost_at,
        "batch": batch,
        "fall": branches.fall,
        "branches": [
            {key: plain(value) for key, value in asdict(branch).items()} for branch in branches.branches
        ],
        "recommended": recommended,
        "disagreements": disagree,
    }
    return Said(0, payload, lines)
