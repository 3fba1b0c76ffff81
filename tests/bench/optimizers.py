"""Time and bytes of an optimizer's step, ours beside torch's, timm's and pytorch_optimizer's.

    python -m tests.bench.optimizers [--out optimizers.json] [--rounds 12]

On the parameter shapes of ResNet-50 and GPT-2 small (float32, random values), one thread, processor time. In each
round every optimizer makes one step, in turn, on the same parameters; the number is the mean over whole cycles of
LookAhead, so its synchronizations are in it, after two rounds that make the state. Ratios are to torch's SGD with
momentum, fused and foreach, in the same rounds.

Bytes: of the operations that torch dispatches, all tensors that a call reads or writes count once each way, by the
sizes of its arguments and results (views count nothing). Our kernel is a call that torch does not see; its streams
are counted from what layerwise.cpp loads and stores, and so are those of torch's own fused kernels, from their
definitions (SGD 5, AdamW 7). Nothing is taken off for what a cache saves. The floor is the least a step can move if
nothing stays in a cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.optim import LAMB, LARS, Ranger, RangerLARS
from orchestrator.optim.fast.build import kernel
from tests.bench.machine import machine

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
LR = 1e-4
DECAY = {"sgd": 0.0, "adamw": 0.0}  # 1e-4 for all others: timm adapts a layer only if it is decayed

# What layerwise.cpp loads and stores of an adapted tensor, in tensors of its size; LookAhead's part is 2 / 6.
OWN_STREAMS = {"lars": 7.0, "lamb": 10.0, "ranger": 7 + 2 / 6, "ranger_lars": 10 + 2 / 6}
FLOORS = {
    "sgd": 5.0,
    "adamw": 7.0,
    "radam": 7.0,
    "lars": 7.0,
    "lamb": 10.0,
    "ranger": 7 + 2 / 6,
    "ranger_lars": 10 + 2 / 6,
}


def resnet50() -> list[torch.Size]:
    """Shapes of torchvision's ResNet-50."""
    import torchvision

    with torch.device("meta"):
        return [p.shape for p in torchvision.models.resnet50(weights=None).parameters()]


def gpt2() -> list[torch.Size]:
    """Shapes of GPT-2 small: 12 blocks of width 768, the head shared with the embedding."""
    width = 768
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    shapes: list[tuple[int, ...]] = [(50257, width), (1024, width), *(12 * block), (width,), (width,)]
    return [torch.Size(shape) for shape in shapes]


SHAPES = {"resnet50": resnet50, "gpt2": gpt2}


def own(name: str, cls: Any) -> dict[str, tuple[str, Make]]:
    """One of ours by its fast path and by its reference."""
    return {
        f"{name} (ours)": (name, lambda groups: cls(groups, lr=LR)),
        f"{name} (ours, reference)": (name, lambda groups: cls(groups, lr=LR, implementation="reference")),
    }


def contenders() -> dict[str, tuple[str, Make]]:
    """Name -> (kind, maker); what is not installed is left out."""
    adapted = "layer_adaptation"

    def plain(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> Make:
        # Other libraries refuse, or keep, a key of ours in a group.
        return lambda groups: make([{k: v for k, v in group.items() if k != adapted} for group in groups])

    answer: dict[str, tuple[str, Make]] = {
        "sgd fused (torch)": ("sgd", plain(lambda g: torch.optim.SGD(g, lr=LR, momentum=0.9, fused=True))),
        "sgd foreach (torch)": (
            "sgd",
            plain(lambda g: torch.optim.SGD(g, lr=LR, momentum=0.9, foreach=True)),
        ),
        "adamw fused (torch)": ("adamw", plain(lambda g: torch.optim.AdamW(g, lr=LR, fused=True))),
        **own("lars", LARS),
        **own("lamb", LAMB),
        **own("ranger", Ranger),
        **own("ranger_lars", RangerLARS),
    }
    try:
        from timm.optim import Lamb as TimmLamb
        from timm.optim import Lars as TimmLars

        answer["lars (timm)"] = ("lars", plain(lambda g: TimmLars(g, lr=LR, momentum=0.9)))
        answer["lamb (timm)"] = ("lamb", plain(lambda g: TimmLamb(g, lr=LR)))
    except ImportError:
        pass
    try:
        import pytorch_optimizer as peer

        answer["lamb (pytorch_optimizer)"] = ("lamb", plain(lambda g: peer.Lamb(g, lr=LR)))
        answer["ranger (pytorch_optimizer)"] = ("ranger", plain(lambda g: peer.Ranger(g, lr=LR)))
    except ImportError:
        pass
    return answer


OVERWRITING = frozenset({"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_"})


class CountedBytes(TorchDispatchMode):
    """Adds up what the calls inside read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = func(*args, **kwargs)
        if func.is_view or func.namespace != "aten" or "detach" in str(func) or "empty" in str(func):
            return out
        arguments = dict(zip([a.name for a in func._schema.arguments], args)) | kwargs
        written: list[torch.Tensor] = []
        overwritten: set[int] = set()
        for argument in func._schema.arguments:
            if (
                argument.alias_info is None
                or not argument.alias_info.is_write
                or argument.name not in arguments
            ):
                continue
            tensors = [t for t in pytree.tree_leaves(arguments[argument.name]) if isinstance(t, torch.Tensor)]
            written += tensors
            if argument.is_out or func._schema.name in OVERWRITING:
                overwritten |= {id(t) for t in tensors}
        known = {id(t) for t in before}
        written += [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) not in known]
        read = {id(t): t for t in before if id(t) not in overwritten}
        self.total_bytes += sum(t.nbytes for t in read.values()) + sum(t.nbytes for t in written)
        return out


def parameters_of(shapes: list[torch.Size]) -> list[nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)
    return parameters


def groups_of(parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Vectors are not decayed and not adapted."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "layer_adaptation": False},
    ]


def streams(name: str, kind: str, optimizer: torch.optim.Optimizer, size: int) -> tuple[float, str]:
    """Tensors read and written in a step, over the size of the model; and how that is known."""
    if name.endswith("(ours)") and kernel().functions is not None:
        return OWN_STREAMS[kind], "from the kernel's definition"
    if "fused" in name:
        return FLOORS[kind], "from the kernel's definition"
    counted = []
    for _ in range(6):
        with CountedBytes() as mode:
            optimizer.step()
        counted.append(mode.total_bytes)
    return statistics.mean(counted) / (4 * size), "counted"


def measure(shapes: list[torch.Size], rounds: int, leave_out: str) -> list[dict[str, Any]]:
    """One row per contender."""
    chosen = {name: value for name, value in contenders().items() if not leave_out or leave_out not in name}
    parameters = parameters_of(shapes)
    optimizers = {
        name: make(groups_of(parameters, DECAY.get(kind, 1e-4))) for name, (kind, make) in chosen.items()
    }
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    pristine = [gradient.clone() for gradient in gradients]
    size = sum(math.prod(shape) for shape in shapes)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    gc.collect()
    gc.disable()
    for round_number in range(rounds + 2):
        for name, optimizer in optimizers.items():
            torch._foreach_copy_(gradients, pristine)  # several peers write to them
            start = time.process_time()
            optimizer.step()
            if round_number >= 2:
                seconds[name].append(time.process_time() - start)
    gc.enable()
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    rows = []
    for name, (kind, _) in chosen.items():
        moved, how = streams(name, kind, optimizers[name], size)
        rows.append(
            {
                "optimizer": name,
                "mean_s": means[name],
                "median_s": statistics.median(seconds[name]),
                "to_sgd_fused": means[name] / means["sgd fused (torch)"],
                "to_sgd_foreach": means[name] / means["sgd foreach (torch)"],
                "streams": moved,
                "streams_known": how,
                "floor_streams": FLOORS[kind],
                "to_floor": moved / FLOORS[kind],
                "moved_bytes_per_s": 4 * size * moved / means[name],
            }
        )
    return rows


def main() -> None:
    """Measure and print; --out writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=12, help="a multiple of 6 holds whole cycles of LookAhead"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--leave-out", default="", help="part of a name: GPT-2 with all of them takes 20 GB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = machine("torch", "timm", "pytorch_optimizer", "torchvision", "numpy")
    console = Console(width=130)
    console.print(found)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.shapes:
        shapes = SHAPES[name]()
        rows = results[name] = measure(shapes, arguments.rounds, arguments.leave_out)
        table = Table(title=f"{name}, {sum(math.prod(s) for s in shapes) / 1e6:.1f} M parameters")
        for column in (
            "optimizer",
            "ms",
            "median",
            "SGD fused",
            "SGD foreach",
            "streams",
            "floor",
            "ratio",
            "GB/s",
        ):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in rows:
            table.add_row(
                row["optimizer"],
                f"{1e3 * row['mean_s']:.1f}",
                f"{1e3 * row['median_s']:.1f}",
                f"{row['to_sgd_fused']:.2f}",
                f"{row['to_sgd_foreach']:.2f}",
                f"{row['streams']:.2f}",
                f"{row['floor_streams']:.2f}",
                f"{row['to_floor']:.2f}",
                f"{row['moved_bytes_per_s'] / 1e9:.1f}",
            )
        console.print(table)
    if arguments.out is not None:
        what = " ".join((__doc__ or "").split("\n\n")[0].split())
        answer = {
            "what": what,
            "machine": found,
            "threads": 1,
            "rounds": arguments.rounds,
            "results": results,
        }
        arguments.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
