"""What an operation demands, without any hardware: Work of one device, Collective of several."""

import math
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

WorkKind = Literal[
    "matmul", "convolution", "attention", "reduction", "elementwise", "gather", "copy", "view", "random"
]
CollectiveKind = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast"]

WORK_KINDS: Final[tuple[str, ...]] = get_args(WorkKind)
COLLECTIVE_KINDS: Final[tuple[str, ...]] = get_args(CollectiveKind)

# Kinds that run on matrix units where a device has them; all others run on its vector units.
MATRIX_KINDS: Final[frozenset[str]] = frozenset({"matmul", "convolution", "attention"})

# PyTorch's names without "torch.", and tf32: float32 tensors multiplied in TensorFloat-32.
DTYPES: Final[tuple[str, ...]] = (
    *("float64", "float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
    *("complex128", "complex64", "complex32", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool"),
)


@dataclass(frozen=True)
class Work:
    """Demand of one operation on one device.

    Args:
        flop: floating-point operations; a fused multiply-add counts as two.
        read_bytes: bytes that must come from memory at least once.
        written_bytes: bytes that must go to memory at least once.
        dtype: of the arithmetic, one of `DTYPES`.
        kind: one of `WORK_KINDS`; a "view" moves no data and launches nothing.
        operation: operator, shapes, strides and arguments in one line, by which a time measured on a device is
            found again; "" where it is not known. Equal demands are equal whatever it says.

    Raises:
        ValueError: a negative or infinite count, an unknown dtype or kind, or a view with work in it.
    """

    flop: float
    read_bytes: int
    written_bytes: int
    dtype: str
    kind: WorkKind
    operation: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("flop", "read_bytes", "written_bytes"):
            count = getattr(self, name)
            if not math.isfinite(count) or count < 0:
                raise ValueError(f"Work.{name} must be finite and at least 0: got {count!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Work.dtype is unknown: got {self.dtype!r}. Give one of {', '.join(DTYPES)}.")
        if self.kind not in WORK_KINDS:
            raise ValueError(f"Work.kind is unknown: got {self.kind!r}. Give one of {', '.join(WORK_KINDS)}.")
        if self.kind == "view" and (self.flop or self.read_bytes or self.written_bytes):
            raise ValueError(
                f"a view moves no data: got {self.flop} FLOP, {self.read_bytes} B read, "
                f"{self.written_bytes} B written. Give zeros, or the kind 'copy'."
            )

    @property
    def moved_bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.read_bytes + self.written_bytes


VIEW: Final = Work(flop=0.0, read_bytes=0, written_bytes=0, dtype="float32", kind="view")


@dataclass(frozen=True)
class Collective:
    """Demand of one collective operation.

    Args:
        kind: one of `COLLECTIVE_KINDS`.
        size_bytes: the full buffer: of one rank before a reduction, or of one rank after an all-gather.
        world_size: number of ranks that take part.

    Raises:
        ValueError: an unknown kind, a negative size, or world_size < 1.
    """

    kind: CollectiveKind
    size_bytes: int
    world_size: int

    def __post_init__(self) -> None:
        if self.kind not in COLLECTIVE_KINDS:
            raise ValueError(
                f"Collective.kind is unknown: got {self.kind!r}. Give one of {', '.join(COLLECTIVE_KINDS)}."
            )
        if self.size_bytes < 0:
            raise ValueError(f"Collective.size_bytes must be at least 0: got {self.size_bytes!r}.")
        if self.world_size < 1:
            raise ValueError(f"Collective.world_size must be at least 1: got {self.world_size!r}.")
