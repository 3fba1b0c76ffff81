"""A few steps of a job on one worker, then the noise scale at the weights that they lead to."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from orchestrator.batch_size.noise_scale import NoiseScale
from orchestrator.batch_size.short_run import NoisePoint, RunFailure, RunRequest, ShortRun, failure_of

# Share of the probe's time that its steps may take; the rest is for the measurement.
_STEPS_SHARE = 0.4
_WARMUP = 0.1
_MIN_STEPS = 20


@dataclass(frozen=True)
class ProbeRequest:
    """What is to be probed; plain values, so that it can be sent to any process.

    Attributes:
        run: whose weights; its limit and target are not looked at.
        before: steps that its checkpoint has done; new weights where it has none.
        time_limit_s: of steps and measurement.
    """

    run: RunRequest
    before: int
    time_limit_s: float


@dataclass(frozen=True)
class Probed:
    """What came of it.

    Attributes:
        noise: the estimate.
        point: the same with the step and the loss there.
    """

    noise: NoiseScale
    point: NoisePoint


@dataclass(frozen=True)
class Unanswered:
    """The loss went astray before anything could be measured.

    Attributes:
        message: a sentence.
    """

    message: str


def probe(request: ProbeRequest) -> Probed | Unanswered | RunFailure:
    """Do a probe; what goes wrong is a value, so that it can cross processes."""
    try:
        return _probe(request)
    except Exception as error:  # the user's own code may raise anything
        return failure_of(error, "the probe")


def _probe(request: ProbeRequest) -> Probed | Unanswered:
    started_s = time.monotonic()
    run = ShortRun(request.run)
    rate = request.run.rate
    if request.run.checkpoint is None:
        # As far as the warm-up goes: gradients before its end are of another scale.
        wanted = max(_MIN_STEPS, math.ceil(_WARMUP * run.job.train.steps))
        schedule = run.phase.make_schedule(run.optimizer)
        while run.steps < wanted and time.monotonic() < started_s + _STEPS_SHARE * request.time_limit_s:
            loss = run.step()
            schedule.move_to(run.steps)
            if not math.isfinite(loss):
                return Unanswered(
                    f"the loss is not finite after {run.steps} steps at rate {rate:g}. Lower the rate of the job, "
                    "or have a look at its data."
                )
    step, loss = request.before + run.steps, run.evaluate()
    if not math.isfinite(loss):
        if step == 0:
            return Unanswered(
                "the loss is not finite before the first step. Have a look at the model, its loss and the data."
            )
        return Unanswered(f"the loss after {step} steps is not finite. Lower the rate of the job.")
    noise = run.noise(num_examples=None, deadline_s=started_s + request.time_limit_s)
    return Probed(noise, NoisePoint.of(noise, step=step, loss=loss))
