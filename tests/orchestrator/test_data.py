"""The order of the data: every sample once an epoch, whatever the layout, and the same from any position."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from orchestrator.data import (
    BatchLayout,
    SampleStream,
    check_batch,
    collate,
    load_datasets,
    rank_batches,
    validation_indices,
)
from orchestrator.job import JobSpec
from planner.inputs.strict import WorkloadError
from planner.inputs.workload import TensorSpec

SIZES = st.integers(1, 40)
LAYOUTS = st.builds(BatchLayout, st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))


def step_samples(stream: SampleStream, layout: BatchLayout, samples_seen: int) -> list[int]:
    """Indices that all ranks together read in one step."""
    return [
        index
        for rank in range(layout.world_size)
        for micro in range(layout.accumulation)
        for index in stream.indices(layout.start(samples_seen, micro=micro, rank=rank), layout.micro_batch)
    ]


@given(num_samples=SIZES, layout=LAYOUTS, shuffle=st.booleans(), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_each_epoch_holds_every_sample_exactly_once(
    num_samples: int, layout: BatchLayout, shuffle: bool, seed: int
):
    # Steps whose samples make up whole epochs: as many as there are samples.
    stream = SampleStream(num_samples, seed=seed, shuffle=shuffle)
    read: Counter[int] = Counter()
    for step in range(num_samples):
        read.update(step_samples(stream, layout, step * layout.global_batch))
    assert read == {index: layout.global_batch for index in range(num_samples)}


@given(num_samples=SIZES, start=st.integers(0, 200), count=st.integers(0, 100), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_stream_continues_from_any_position(num_samples: int, start: int, count: int, seed: int):
    undisturbed = SampleStream(num_samples, seed=seed).indices(0, start + count)
    assert SampleStream(num_samples, seed=seed).indices(start, count) == undisturbed[start:]


@given(num_samples=SIZES, layout=LAYOUTS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(
    num_samples: int, layout: BatchLayout, seed: int
):
    alone = BatchLayout(layout.global_batch, 1, 1)
    stream = SampleStream(num_samples, seed=seed)
    together = sorted(step_samples(stream, layout, 7))
    assert together == sorted(step_samples(stream, alone, 7))


def test_epochs_and_seeds_have_different_orders():
    # 1 in 50! chances that two orders agree by accident.
    one, other = SampleStream(50, seed=0), SampleStream(50, seed=1)
    assert one.indices(0, 50) != one.indices(50, 50)
    assert one.indices(0, 50) != other.indices(0, 50)
    assert one.indices(0, 50) != list(range(50))


@given(num_samples=SIZES, wanted=st.integers(1, 60), micro=st.integers(1, 7), world=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_ranks_share_the_validation_samples(num_samples: int, wanted: int, micro: int, world: int):
    indices = validation_indices(num_samples, wanted=wanted)
    shared = [
        index
        for rank in range(world)
        for batch in rank_batches(indices, micro_batch=micro, rank=rank, world_size=world)
        for index in batch
    ]
    assert len(set(indices)) == len(indices) == min(num_samples, wanted)
    assert sorted(shared) == indices


def test_an_empty_training_set_is_refused():
    with pytest.raises(WorkloadError, match="the training set is empty"):
        SampleStream(0, seed=0)


def test_samples_are_stacked_in_the_order_asked_for():
    dataset = TensorDataset(torch.arange(6).reshape(3, 2), torch.tensor([10, 11, 12]))
    inputs, targets = collate(dataset, [2, 0], device=torch.device("cpu"))
    assert inputs.tolist() == [[4, 5], [0, 1]]
    assert targets.tolist() == [12, 10]


def test_data_of_another_shape_than_the_batch_is_refused():
    spec = TensorSpec(shape=(4, 8))
    check_batch(torch.zeros(4, 8), spec, what="the input")
    with pytest.raises(
        WorkloadError, match=r"the input of the data is \[4, 9\] torch.float32, but the batch"
    ):
        check_batch(torch.zeros(4, 9), spec, what="the input")
    with pytest.raises(WorkloadError, match=r"the input\.1 of the data is NoneType"):
        check_batch((torch.zeros(4, 8),), (spec, spec), what="the input")
    with pytest.raises(WorkloadError, match=r"the input\.x of the data is \[4, 8\] torch.int64"):
        check_batch({"x": torch.zeros(4, 8, dtype=torch.int64)}, {"x": spec}, what="the input")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def data():\n    return [1, 2]\n", "must return the pair"),
        ("def data():\n    return [1], iter([2])\n", "must return the pair"),
        ("def data():\n    raise FileNotFoundError('no such disk')\n", "FileNotFoundError: no such disk"),
        ("def data():\n    return [(1, 2)], []\n", "the validation set is empty"),
    ],
)
def test_data_that_cannot_be_used_is_refused(write_job: Any, tmp_path: Any, source: str, expected: str):
    (tmp_path / "sets.py").write_text(source)
    job = JobSpec.load(write_job(train={"data": "sets.py:data"}))
    with pytest.raises(WorkloadError, match=expected):
        load_datasets(job.train.data)
