"""A file of hardware that is wrong is answered with its name, the key, what was got and what may stand there."""

from pathlib import Path

import pytest

from cost_models import read_hardware

GOOD_FILE = """
kind = "gpu"
memory_bytes = 8_000_000_000
memory_bytes_per_s = 4.0e11
launch_latency_s = 1.0e-6
power_watts = 300
idle_power_watts = 60
[peak_flop_per_s]
float32 = 2.0e12
[links.host]
name = "PCIe"
bytes_per_s = 1.0e10
latency_s = 1.0e-6
[sources]
memory_bytes = "a"
memory_bytes_per_s = "a"
launch_latency_s = "a"
power_watts = "a"
idle_power_watts = "a"
[sources.peak_flop_per_s]
float32 = "a"
[sources.links.host]
bytes_per_s = "a"
latency_s = "a"
"""
RATE = "a number from 1e+09 to 1e+16 FLOP/s"


def test_a_file_is_named_by_its_stem(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD_FILE)
    assert (read_hardware(path).name, read_hardware(path).memory_bytes) == ("mine", 8_000_000_000)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        # A number without a source, a source without a number.
        ('float32 = "a"', "", "peak_flop_per_s.float32 has no source. Add it under [sources]."),
        ('memory_bytes = "a"', 'memory_bytes = " "', "memory_bytes has no source."),
        ("[sources]", '[sources]\ncolour = "a"', "sources.colour belongs to no number of the file."),
        # A key that is missing or unknown.
        ('kind = "gpu"', "", "the top level lacks the key 'kind'. Add it."),
        (
            "power_watts = 300",
            "",
            "the top level lacks the key 'power_watts'. Add it: a number from 1 to 2000 W.",
        ),
        ("float32 = 2.0e12", "", f"peak_flop_per_s lacks the key 'float32'. Add it: {RATE}."),
        (
            '"PCIe"\nbytes_per_s = 1.0e10\nlatency_s = 1.0e-6',
            '"PCIe"\nbytes_per_s = 1.0e10',
            "links.host lacks the key 'latency_s'. Add it: a number from 1e-07",
        ),
        ('name = "PCIe"', "", "links.host lacks the key 'name'. Add it."),
        (
            'kind = "gpu"',
            'kind = "gpu"\ncolour = "red"',
            "the top level has the unknown key 'colour'. Give one of",
        ),
        ('name = "PCIe"', 'name = "PCIe"\nlanes = 16', "links.host has the unknown key 'lanes'. Give one of"),
        (
            "[peak_flop_per_s]",
            "[flop_per_cycle]",
            "the top level lacks the key 'clock_hz'. Add it: a number from",
        ),
        # An absurd number.
        (
            "power_watts = 300",
            "power_watts = 9000",
            "power_watts must be a number from 1 to 2000 W: got 9000.",
        ),
        (
            "4.0e11",
            "4.0e14",
            "memory_bytes_per_s must be a number from 1e+09 to 2e+13 B/s: got 400000000000000.0.",
        ),
        ("8_000_000_000", "80", "memory_bytes must be a number from 1e+09 to 1e+12 B: got 80."),
        ("8_000_000_000", "8.5e9", "hardware 'mine': memory_bytes must be a whole number: got 8500000000.0."),
        ("float32 = 2.0e12", "float32 = 2.0", f"peak_flop_per_s.float32 must be {RATE}: got 2.0."),
        ("float32 = 2.0e12", "float32 = -2.0e12", f"peak_flop_per_s.float32 must be {RATE}: got -2"),
        ("float32 = 2.0e12", "float32 = nan", f"peak_flop_per_s.float32 must be {RATE}: got nan."),
        ("float32 = 2.0e12", "float32 = inf", f"peak_flop_per_s.float32 must be {RATE}: got inf."),
        ("1.0e-6", "1.0", "launch_latency_s must be a number from 1e-07 to 0.001 s: got 1.0."),
        ("1.0e10", "1.0e3", "links.host.bytes_per_s must be a number from 1e+08 to 2e+13 B/s: got 1000.0."),
        # A value of the wrong type.
        ("= 300", '= "300 W"', "power_watts must be a number from 1 to 2000 W: got '300 W'."),
        ("= 300", "= true", "power_watts must be a number from 1 to 2000 W: got True."),
        ("= 300", "= [300]", "power_watts must be a number from 1 to 2000 W: got [300]."),
        (
            "[peak_flop_per_s]\nfloat32",
            "peak_flop_per_s",
            "peak_flop_per_s must be a table [peak_flop_per_s]: got",
        ),
        ('kind = "gpu"', 'kind = "npu"', "hardware 'mine': kind must be 'cpu', 'gpu' or 'tpu': got 'npu'."),
        (
            "float32 = 2.0e12",
            "float32 = 2.0e12\nfp16 = 2.0e12",
            "peak_flop_per_s has the unknown key 'fp16'.",
        ),
        # No TOML.
        ("kind =", "kind", "not a TOML file: "),
        ("[sources]", "[sources", "not a TOML file: "),
        (
            "[sources]",
            '[efficiency.matmul]\ncompute = 2.0\nmemory = 1.0\nsource = "a"\n[sources]',
            "efficiency.matmul.compute must be a number from 0 to 1: got 2.0.",
        ),
        (
            "[sources]",
            '[efficiency.matmul]\ncompute = 0.0\nmemory = 1.0\nsource = "a"\n[sources]',
            "Efficiency.compute must lie in (0, 1]: got 0.0.",
        ),
        (
            "[sources]",
            '[efficiency.matmul]\ncompute = "fast"\nmemory = 1.0\nsource = "a"\n[sources]',
            "efficiency.matmul.compute must be a number from 0 to 1: got 'fast'.",
        ),
        (
            "[sources]",
            '[efficiency.random]\ncompute = 1.0\nmemory = 1.0\nserial_s = 7\nsource = "a"\n[sources]',
            "efficiency.random.serial_s must be a number from 0 to 1e-06 s: got 7.",
        ),
        (
            "[sources]",
            "[efficiency.matmul]\ncompute = 1.0\nmemory = 1.0\n[sources]",
            "efficiency.matmul lacks the key 'source'. Add it.",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_field(tmp_path: Path, old: str, new: str, sentence: str):
    path = tmp_path / "mine.toml"
    assert old in GOOD_FILE
    path.write_text(GOOD_FILE.replace(old, new, 1))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  (the sentence is compared below)
        read_hardware(path)
    assert str(refusal.value).startswith(f"mine.toml: {sentence}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 64, b"{}", b"kind = "])
def test_a_corrupted_file_is_refused_as_no_toml(tmp_path: Path, content: bytes):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^mine\.toml: not a TOML file: "):
        read_hardware(path)
