"""Estimators of the noise scale against linear regressions and quadratics whose truth is known in closed form.

    python -m tests.bench.noise_truth [--out noise_truth.json] [--copies 40]

The models, the steps and the judge are those of tests/orchestrator/batch_size/test_analytic_truth.py, with more
problems: at each noise scale (1, 4 and 16 big batches of 16 examples) z of the mean of |G|^2 and of tr(Sigma), and
the share of nominal 95 % intervals from 40 steps that hold the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tests.bench.machine import machine, show
from tests.orchestrator.batch_size.analytic import (
    LinearRegressions,
    Quadratics,
    SteepQuadratics,
    coverage,
    scores,
)
from tests.orchestrator.batch_size.test_analytic_truth import (
    BIG,
    SCALES,
    STEPS,
    micro_batch_norms,
    norms_of_rank,
    single_example_norms,
)
from tests.ranks import on_ranks


def judged(norms: Any, *sizes: int) -> list[dict[str, float]]:
    """One row a noise scale."""
    zs, shares = (judge(*norms, sizes=sizes, scales=SCALES) for judge in (scores, coverage))
    return [
        {
            "b_simple": scale,
            "draws": norms[0].size // len(SCALES),
            "z_g2": round(z[0], 2),
            "z_tr_s": round(z[1], 2),
            "coverage": share,
        }
        for scale, z, share in zip(SCALES, zs, shares)
    ]


def main() -> None:
    """Judge every estimator, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--copies", type=int, default=40, help="problems of each noise scale")
    options = parser.parse_args()
    torch.set_num_threads(1)
    copies = options.copies
    problems = (LinearRegressions, Quadratics, SteepQuadratics)
    linear, quadratic, steep = (made(SCALES, copies=copies) for made in problems)
    found = {
        "micro-batches, linear regression": judged(
            micro_batch_norms(linear, [4] * 4, steps=STEPS, seed=10), 4, BIG
        ),
        "micro-batches, quadratic": judged(
            micro_batch_norms(quadratic, [4] * 4, steps=STEPS, seed=11), 4, BIG
        ),
        "micro-batches, quadratic with noise in two directions": judged(
            micro_batch_norms(steep, [4] * 4, steps=STEPS, seed=13), 4, BIG
        ),
        "single examples, linear regression": judged(
            single_example_norms(linear, steps=STEPS, seed=12), 1, BIG
        ),
    }
    for world_size, micro in ((2, 2), (4, 1)):
        norms = on_ranks(norms_of_rank, micro, copies, world_size=world_size)[0]
        small = BIG // world_size
        found[f"{world_size} gloo ranks, linear regression"] = judged(norms["ranks"], small, BIG)
        name = f"{micro} micro-batches on each of {world_size} gloo ranks, linear regression"
        found[name] = judged(norms["combined"], small // micro, BIG)
    result = {"machine": machine("torch"), "steps": STEPS, "copies": copies, "estimators": found}
    show(result, options.out)


if __name__ == "__main__":
    main()
