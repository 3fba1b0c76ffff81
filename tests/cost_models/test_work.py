import pytest

from cost_models import Collective, Work


def test_moved_bytes_are_the_read_and_the_written_ones():
    assert Work(1.0, 30, 12, "float32", "elementwise").moved_bytes == 42


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-1.0, 0, 0, "float32", "matmul"), r"^Work\.flop must be finite and at least 0: got -1\.0\.$"),
        ((float("inf"), 0, 0, "float32", "matmul"), r"^Work\.flop must be finite"),
        ((float("nan"), 0, 0, "float32", "matmul"), r"^Work\.flop must be finite"),
        ((0.0, -4, 0, "float32", "matmul"), r"^Work\.read_bytes must be finite and at least 0: got -4\.$"),
        ((0.0, 0, -4, "float32", "matmul"), r"^Work\.written_bytes must be"),
        (
            (0.0, 0, 0, "torch.float32", "matmul"),
            r"^Work\.dtype is unknown: got 'torch\.float32'\. Give one of",
        ),
        ((0.0, 0, 0, "float32", "gemm"), r"^Work\.kind is unknown: got 'gemm'\. Give one of matmul, "),
        ((0.0, 4, 0, "float32", "view"), r"^a view moves no data: got .*Give zeros, or the kind 'copy'\.$"),
    ],
)
def test_impossible_work_is_refused_in_one_sentence(arguments: tuple, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Work(*arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("all_to_all", 8, 2), r"^Collective\.kind is unknown: got 'all_to_all'\. Give one of all_reduce, "),
        (("all_reduce", -8, 2), r"^Collective\.size_bytes must be at least 0: got -8\.$"),
        (("all_reduce", 8, 0), r"^Collective\.world_size must be at least 1: got 0\.$"),
    ],
)
def test_impossible_collectives_are_refused_in_one_sentence(arguments: tuple, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Collective(*arguments)
