import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import (
    format_bytes,
    format_flop,
    format_seconds,
    parse_bytes,
    parse_bytes_per_s,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0B", 0),
        ("512 B", 512),
        ("2KB", 2_000),
        ("2kB", 2_000),
        ("2KiB", 2_048),
        ("1.5MB", 1_500_000),
        ("80GB", 80_000_000_000),
        ("40GiB", 42_949_672_960),  # 40 * 1024**3
        ("1TB", 1_000_000_000_000),
        (" 1 TiB ", 1_099_511_627_776),  # 1024**4
        ("1e3MB", 1_000_000_000),
        ("0.1KB", 100),  # exactly, though 0.1 has no exact binary fraction
        ("1.9B", 1),  # a fraction of a byte is dropped
    ],
)
def test_bytes_are_parsed_exactly(text: str, size_bytes: int):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("40", "the size has no unit: got '40'"),
        (40, "the size has no unit: got 40"),
        ("-1GiB", "the size is negative: got '-1GiB'"),
        ("40Gb", "the size has the unknown unit 'Gb'"),
        ("40gib", "the size has the unknown unit 'gib'"),
        ("GiB", "the size is not a number with a unit: got 'GiB'"),
        ("", "the size is not a number with a unit: got ''"),
        ("1,5GiB", "the size is not a number with a unit"),
        ("nanGiB", "the size is not a number with a unit"),
        (None, "the size is not a number with a unit: got None"),
    ],
)
def test_bad_sizes_are_refused_with_what_to_write(text: str, sentence: str):
    with pytest.raises(ValueError, match="Write a number with one of the units") as refusal:
        parse_bytes(text)
    assert str(refusal.value).startswith(sentence)
    assert "for example '40GiB'" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "time_s"),
    [
        ("90s", 90.0),
        ("500ms", 0.5),
        ("2min", 120.0),
        ("1h", 3600.0),
        ("3us", 3e-6),
        ("3µs", 3e-6),
        ("7ns", 7e-9),
    ],
)
def test_durations_are_parsed_to_seconds(text: str, time_s: float):
    assert parse_seconds(text) == time_s


@pytest.mark.parametrize("text", ["90", "-1s", "1 day", "s"])
def test_bad_durations_are_refused_with_what_to_write(text: str):
    with pytest.raises(ValueError, match=r"^the duration .*got .*for example '90s'\.$"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("25GB/s", 25e9),
        ("1.5 TB/s", 1.5e12),
        ("2GiB/s", 2_147_483_648.0),  # 2 * 1024**3
        ("200Gbit/s", 25e9),  # eight bits to a byte
        ("3.2Tbit/s", 400e9),
        ("800Mbit/s", 100e6),
    ],
)
def test_bandwidths_are_parsed_to_bytes_a_second(text: str, bytes_per_s: float):
    assert parse_bytes_per_s(text) == bytes_per_s


@pytest.mark.parametrize(
    "text", ["25", 25e9, "25GB", "25Gb/s", "200Gbps", "-1GB/s", "GB/s", "25GB/", "1GB/s/s"]
)
def test_bad_bandwidths_are_refused_with_what_to_write(text: str):
    with pytest.raises(ValueError, match=r"^the bandwidth .*got .*for example '25GB/s'\.$"):
        parse_bytes_per_s(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_610_612_736, "1.50 GiB"),
        (-1536, "-1.50 KiB"),
        (1_048_575, "1.00 MiB"),  # 1023.999 KiB would print as 1024.00 KiB
        (5 * 2**50, "5120.00 TiB"),
    ],
)
def test_bytes_are_printed_in_binary_units(size_bytes: int, text: str):
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0.0, "0 s"),
        (2e-9, "2.00 ns"),
        (3.8e-6, "3.80 µs"),
        (0.0125, "12.50 ms"),
        (0.9999999, "1.00 s"),
        (90.0, "90.00 s"),
        (150.0, "2.50 min"),
        (9000.0, "2.50 h"),
    ],
)
def test_seconds_are_printed_in_the_unit_people_use(time_s: float, text: str):
    assert format_seconds(time_s) == text


def test_flop_are_printed_in_decimal_units():
    assert [format_flop(flop) for flop in (12, 2.5e12, 3e20)] == ["12.00 FLOP", "2.50 TFLOP", "300.00 EFLOP"]


@given(st.integers(min_value=0, max_value=2**53))
def test_printed_bytes_parse_back_within_their_two_decimals(size_bytes: int):
    # Two decimals of a number of at least 1.00 are off by at most 0.005 / 1.00.
    assert abs(parse_bytes(format_bytes(size_bytes)) - size_bytes) <= 0.005 * size_bytes + 1
