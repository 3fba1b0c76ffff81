"""Optimizers of the package pytorch_optimizer by name: NovoGrad, AdaHessian and many more; optional."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGE = "pytorch_optimizer"
INSTALL = "pip install 'lowtide[optimizers]'"

SECOND_DERIVATIVES = frozenset({"adahessian", "sophiah"})
"""Their steps read the graph of the gradients, which only backward(create_graph=True) leaves."""


def is_installed() -> bool:
    """Whether pytorch_optimizer is there; nothing is imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def long_tail_names() -> list[str]:
    """Names that pytorch_optimizer knows, sorted; none where it is not installed."""
    if not is_installed():
        return []
    return sorted(importlib.import_module(PACKAGE).get_supported_optimizers())


def long_tail_class(name: str) -> type[torch.optim.Optimizer] | None:
    """The class that pytorch_optimizer has under this name, if it is installed and has one."""
    if name not in long_tail_names():
        return None
    return importlib.import_module(PACKAGE).load_optimizer(name)
