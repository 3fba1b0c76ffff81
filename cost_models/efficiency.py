"""The fraction of its peak that a device reaches, for each kind of work, and where the figure is from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cost_models.work import WORK_KINDS


@dataclass(frozen=True)
class Efficiency:
    """Reachable fraction of the peak of one kind of work.

    Args:
        compute: fraction of the peak FLOP/s, in (0, 1].
        memory: fraction of the peak bytes/s, in (0, 1].
        source: where the numbers are from.
        serial_s: seconds of one operation (a FLOP as `Work` counts them) where each waits for the one before it, so
            that neither lanes nor cores help; 0.0 where nothing waits.

    Raises:
        ValueError: a fraction outside (0, 1], a negative or infinite time, or no source.
    """

    compute: float
    memory: float
    source: str
    serial_s: float = 0.0

    def __post_init__(self) -> None:
        for field in ("compute", "memory"):
            fraction = getattr(self, field)
            if not 0 < fraction <= 1:
                raise ValueError(f"Efficiency.{field} must lie in (0, 1]: got {fraction!r}.")
        if not (math.isfinite(self.serial_s) and self.serial_s >= 0):
            raise ValueError(f"Efficiency.serial_s must be finite and at least 0: got {self.serial_s!r}.")
        if not self.source.strip():
            raise ValueError("Efficiency.source is empty: got ''. Say where the numbers are from.")


# Large bfloat16 products through cuBLAS: 271 of 312 TFLOP/s on an A100, about 790 of 989 on H100 and H200.
_GEMM = "S. Bekman, Machine Learning Engineering, 2024, maximum achievable matmul FLOPS: A100 0.87, H100 0.80"
# Global memory of a V100: 750 of 900 GB/s.
_HBM = (
    "Jia et al., 2018, Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking: 0.83 of the peak"
)
# A peak counts a fused multiply-add as two; an add or a multiply alone is half of one.
_VECTOR = "compute: one operation in the place of a fused multiply-add; memory: "

# The smallest claim that is published: whole training steps, of which matrix products are the most.
_TPU = "Jouppi et al., 2023, TPU v4: training of a large language model at about 0.60 of the peak"
_TPU_VECTOR = (
    "compute: 2 x 1024 lanes with two units each at 1.05 GHz (Norrie et al., 2021, for the lanes) beside float32 "
    "products as six of bfloat16; memory, as on GPUs: "
)

_XEON = "measured with PyTorch 2.13 on one core of a 2.7 GHz Xeon with AVX-512, DDR taken as 25.6 GB/s: "
# Each number comes from the state that the one before it left, and PyTorch fills a tensor on one thread.
_TWISTER = (
    "serial: PyTorch's Mersenne Twister, measured with PyTorch 2.11, 2.13 and 2.15 on a 2.7 GHz Xeon, ns a number "
    "of 2^14 to 2^22, with two threads as with one: rand and randn 3 to 7, bernoulli 5 to 12, bernoulli_ 6 to 10; "
    "in bfloat16 4 to 9, but randn 27 in 2.11; taken over for all CPUs; fractions as elementwise"
)

DEFAULT_EFFICIENCY: Final[Mapping[str, Mapping[str, Efficiency]]] = {
    "gpu": {
        "matmul": Efficiency(0.8, 0.83, f"{_GEMM}; memory: {_HBM}"),
        "convolution": Efficiency(
            0.8, 0.83, f"an implicit matrix product (Chetlur et al., 2014, cuDNN), so as matmul: {_GEMM}"
        ),
        "attention": Efficiency(
            0.5,
            0.83,
            "Dao, 2023, FlashAttention-2: 0.50 to 0.73 on A100, the lower end for the backward pass",
        ),
        "reduction": Efficiency(0.5, 0.83, _VECTOR + _HBM),
        "elementwise": Efficiency(0.5, 0.83, _VECTOR + _HBM),
        "gather": Efficiency(0.5, 0.83, _VECTOR + "rows of whole 32-byte sectors stream; " + _HBM),
        "copy": Efficiency(0.5, 0.83, _VECTOR + _HBM),
        "random": Efficiency(0.5, 0.83, _VECTOR + "a counter-based generator streams its output; " + _HBM),
    },
    "tpu": {
        "matmul": Efficiency(0.6, 0.83, f"{_TPU}; memory, as on GPUs: {_HBM}"),
        "convolution": Efficiency(0.6, 0.83, f"as matmul: {_TPU}; memory, as on GPUs: {_HBM}"),
        "attention": Efficiency(0.5, 0.83, f"as on GPUs, within {_TPU}; memory, as on GPUs: {_HBM}"),
        "reduction": Efficiency(0.1, 0.83, _TPU_VECTOR + _HBM),
        "elementwise": Efficiency(0.1, 0.83, _TPU_VECTOR + _HBM),
        "gather": Efficiency(0.1, 0.83, _TPU_VECTOR + "rows of whole tiles stream; " + _HBM),
        "copy": Efficiency(0.1, 0.83, _TPU_VECTOR + _HBM),
        "random": Efficiency(0.1, 0.83, _TPU_VECTOR + _HBM),
    },
    "cpu": {
        "matmul": Efficiency(
            0.95, 0.75, _XEON + "float32, n = 1024, 2048, 4096: 1.05, 0.85, 0.97 of nominal"
        ),
        "convolution": Efficiency(0.75, 0.75, _XEON + "3 x 3, 64, 128, 256 channels: 0.64, 0.88, 0.75"),
        "attention": Efficiency(0.55, 0.75, _XEON + "float32, 512 tokens, 64 per head: 0.55"),
        "reduction": Efficiency(0.5, 0.4, _XEON + "sum 0.46, layer norm 0.33 to 0.36, softmax 0.42 to 0.53"),
        "elementwise": Efficiency(0.5, 0.75, _XEON + "ReLU of 256 MiB 0.50, of 16 MiB (in cache) 1.05"),
        "gather": Efficiency(0.5, 0.44, _XEON + "2 KiB rows of a 100 MB table: 0.44"),
        "copy": Efficiency(0.5, 0.75, _XEON + "256 MiB 0.58, 16 MiB (in cache) 1.07"),
        "random": Efficiency(0.5, 0.75, _TWISTER, serial_s=7e-9),
    },
}

assert all(set(table) == set(WORK_KINDS) - {"view"} for table in DEFAULT_EFFICIENCY.values())
