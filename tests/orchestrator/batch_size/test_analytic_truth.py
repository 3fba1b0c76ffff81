"""Every estimator against models whose tr(Sigma) and |G|^2 are known: unbiased, and intervals that cover.

1,000 steps of 20 independent problems at each of three noise scales (1, 4 and 16 big batches): 20,000 draws for a
z-test, 500 windows of 40 steps for a coverage, whose standard error is 1 %. `tests/bench/noise_truth.py` has more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from orchestrator.batch_size.gradient_norms import equivalent_batches
from orchestrator.batch_size.micro_batch_noise import MicroBatchNoise
from orchestrator.batch_size.per_example import per_example
from orchestrator.batch_size.rank_noise import RankNoiseHook
from tests.orchestrator.batch_size.analytic import (
    COPIES,
    LinearRegressions,
    Problems,
    Quadratics,
    check,
    check_unbiased,
)
from tests.ranks import on_ranks

STEPS = 1000
# As many draws in fewer steps: what ranks take is for messages.
RANK_STEPS, RANK_COPIES = STEPS // 2, 2 * COPIES
BIG = 16
SCALES = [float(BIG), 4.0 * BIG, 16.0 * BIG]

pytestmark = pytest.mark.slow


def micro_batch_norms(
    model: Problems, sizes: list[int], *, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """[steps, problems] norms of micro-batches and of the step; the loss is the mean over all examples."""
    generator = torch.Generator().manual_seed(seed)
    noise = MicroBatchNoise(model.parameters(), groups=model.groups())
    factors = [size / sum(sizes) for size in sizes]
    rows = []
    for _ in range(steps):
        model.zero_grad()
        for size, factor in zip(sizes, factors):
            (model(model.draw(size, generator)) * factor).backward()
        norms = noise.observation(num_micro_batches=len(sizes), loss_factor=factors)
        rows.append((norms.small_by_group.numpy(), norms.big_by_group.numpy()))
    small, big = (np.stack(column) for column in zip(*rows))
    return small, big


@pytest.mark.parametrize("problems", [LinearRegressions, Quadratics])
def test_micro_batches(problems: Any):
    small, big = micro_batch_norms(problems(SCALES), [4, 4, 4, 4], steps=STEPS, seed=0)
    check(small, big, sizes=(4, 16), scales=SCALES)


def test_uneven_micro_batches():
    examples = [6, 6, 3, 1]
    small, big = micro_batch_norms(LinearRegressions(SCALES), examples, steps=100, seed=1)
    check_unbiased(small, big, sizes=equivalent_batches(examples, examples), scales=SCALES)


def single_example_norms(model: Problems, *, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, of single examples and batches of BIG."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(steps):
        inputs = model.draw(BIG, generator)
        norms = per_example(
            model, inputs, inputs[:, 0, 0], method="torch_func", groups=model.groups()
        ).norms()
        rows.append((norms.small_by_group.numpy(), norms.big_by_group.numpy()))
    small, big = (np.stack(column) for column in zip(*rows))
    return small, big


def test_single_examples():
    small, big = single_example_norms(LinearRegressions(SCALES), steps=STEPS, seed=2)
    check(small, big, sizes=(1, BIG), scales=SCALES)


def norms_of_rank(rank: int, micro_batches: int, copies: int) -> dict[str, Any]:
    """What both estimators of data-parallel ranks see in the same steps: [2, steps, problems] each."""
    world_size = dist.get_world_size()
    own = BIG // world_size // micro_batches
    model = LinearRegressions(SCALES, copies=copies)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    hook = RankNoiseHook(groups=model.groups()).attach(wrapped)
    noise = MicroBatchNoise(model.parameters(), groups=model.groups())
    generator = torch.Generator().manual_seed(100 + rank)
    rows: dict[str, list[torch.Tensor]] = {"ranks": [], "combined": []}
    for _ in range(RANK_STEPS):
        wrapped.zero_grad(set_to_none=False)
        for _ in range(micro_batches - 1):
            with wrapped.no_sync():
                (wrapped(model.draw(own, generator)) / micro_batches).backward()
        (wrapped(model.draw(own, generator)) / micro_batches).backward()
        seen = hook.own_observation()
        rows["ranks"].append(torch.stack([seen.small_by_group / world_size, seen.big_by_group]))
        seen = noise.observation(
            num_micro_batches=micro_batches, loss_factor=1 / micro_batches, rank=rank, world_size=world_size
        )
        rows["combined"].append(torch.stack([seen.small_by_group / world_size, seen.big_by_group]))
    found = {}
    for name, values in rows.items():
        total = torch.stack(values, 1)
        dist.all_reduce(total)
        found[name] = total.numpy()
    return found if rank == 0 else {}


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 2), (4, 1)])
def test_ranks_and_micro_batches_of_ranks(world_size: int, micro_batches: int):
    found = on_ranks(norms_of_rank, micro_batches, RANK_COPIES, world_size=world_size)[0]
    assert found["ranks"].shape == (2, RANK_STEPS, 3 * RANK_COPIES)
    check(*found["ranks"], sizes=(BIG // world_size, BIG), scales=SCALES)
    check(*found["combined"], sizes=(BIG // world_size // micro_batches, BIG), scales=SCALES)
    if micro_batches == 1:  # the same gradients, read in two places
        np.testing.assert_allclose(found["ranks"], found["combined"], rtol=1e-5)
