"""What a rank holds is what was predicted, to the byte: every optimizer, with a copy each and with a share each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.capturing.gathering import UnitBytes, transient
from planner.capturing.rank_memory import rank_memory, share_shape
from tests.bench.static_memory import CASES, Row, measure, messages
from tests.ranks import on_ranks


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    cases = [
        case for case in CASES if case.model == "uneven mlp" or (case.model, case.optimizer) == ("gpt", "sgd")
    ]
    return [row for rank in on_ranks(measure, cases) for row in rank]


@pytest.mark.slow
def test_what_stays_between_steps_is_predicted_to_the_byte(rows: list[Row]):
    assert len({(row.optimizer, row.sharding) for row in rows}) == 12
    assert [row for row in rows if row.predicted != row.measured] == []


@pytest.mark.slow
def test_what_a_step_gathers_and_sends_is_predicted_to_the_byte(rows: list[Row]):
    found = messages(rows)
    assert len(found) == 8
    for message in found:
        # The loss and its gradient are there whatever the batch is.
        assert 0 <= message.measured - message.predicted <= 16, message


def test_the_last_ranks_have_what_is_left_of_the_rows():
    parameter = torch.empty(10, 3)
    shares = [share_shape(parameter, world_size=4, rank=rank) for rank in range(4)]
    assert shares == [(3, 3), (3, 3), (3, 3), (1, 3)]
    assert [share_shape(torch.empty(1), world_size=2, rank=rank) for rank in range(2)] == [(1,), (0,)]


def test_one_block_beside_the_next_is_what_gathering_needs():
    # Forward: the root 10, the message of block 1 (100), that of block 2 (100) or block 2 itself: 210.
    # Backward of block 2 with block 1's message: 10 + 100 + 100 + gradients 80. Of block 1: 10 + 100 + gradients 80
    # + message of block 2's gradients 100 + the share of block 2, 50: 340. Before, when block 1 is taken out of its
    # message: 10 + 100 + 100 + 100 + 50 = 360.
    root = UnitBytes(gathered=10, early=0, tied=0, late=0, largest=0, reduced=0, share=0)
    block = UnitBytes(gathered=100, early=0, tied=0, late=80, largest=80, reduced=100, share=50)
    found = transient(
        root,
        [block, block],
        reshard_after_forward=True,
        accumulating=False,
        input_has_gradient=True,
        staging=False,
    )
    assert (found.gathered_bytes, found.communication_bytes) == (110, 360)
    keep = transient(
        root,
        [block, block],
        reshard_after_forward=False,
        accumulating=False,
        input_has_gradient=True,
        staging=False,
    )
    # Backward of block 2: 10 + 200 + gradients 80; its message with them: 10 + 100 + 80 + 100; forward, block 2:
    # 10 + 100 + messages 200 = 310, then block 1's goes: 10 + 200 + 100. Backward of block 1: 10 + 100 + 80 + 100
    # + 50 = 340.
    assert (keep.gathered_bytes, keep.communication_bytes) == (210, 340)


def test_each_of_gloos_two_threads_may_still_hold_a_message():
    def unit(size: int) -> UnitBytes:
        return UnitBytes(gathered=size, early=0, tied=0, late=size, largest=size, reduced=size + 1, share=0)

    def late_bytes(blocks: list[UnitBytes], *, staging: bool) -> int:
        return transient(
            unit(10),
            blocks,
            reshard_after_forward=True,
            accumulating=False,
            input_has_gradient=True,
            staging=staging,
        ).late_bytes

    assert late_bytes([unit(100), unit(70)], staging=True) == 101 + 71
    assert late_bytes([], staging=True) == 11
    assert late_bytes([unit(100), unit(70)], staging=False) == 0


def test_sharing_needs_two_ranks():
    with pytest.raises(ValueError, match="at least two ranks"):
        rank_memory(nn.Linear(2, 2), optimizer=None, world_size=1, sharding="fsdp")
    with pytest.raises(ValueError, match="rank must be in"):
        rank_memory(nn.Linear(2, 2), optimizer=None, world_size=2, rank=2)


def test_shares_of_a_model_without_memory_are_counted():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4096, 4096), nn.GELU()) for _ in range(64)))
    memory = rank_memory(
        model,
        optimizer=lambda module: torch.optim.AdamW(module.parameters()),
        world_size=64,
        sharding="fsdp",
        blocks=tuple(str(index) for index in range(64)),
    )
    rows = 4096 // 64
    share = 64 * 4 * rows * (4096 + 1)
    assert memory.parameter_bytes == memory.gradient_bytes == share
    assert memory.optimizer_bytes == 2 * share + 64 * 2 * 4
    assert memory.gathered_bytes == 4 * 4096 * 4097
