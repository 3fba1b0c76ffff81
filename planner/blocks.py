"""The repeated blocks of a model: what is sharded, gathered and planned one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Unit:
    """The parameters that are gathered and reduced together.

    Attributes:
        name: of the block; "" for the root, which holds what lies in no block.
        parameters: each once, in the order in which the modules below list their own, children before parents.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the repeated blocks of a model, in the order in which it lists them.

    Of the children of every `nn.ModuleList` and `nn.Sequential`, at any depth, those of one class:

        blocks = all children of class c, for the c whose children hold the most parameters,
                 among those with at least two children in one list

    so both halves of an encoder-decoder count, and all stages of a residual network. Other layers of a list stay in
    the root. A class that only lists others (`nn.Sequential`) is taken where no other repeats. Not a block is

    - a single layer (`nn.Linear`): to gather a matrix by itself costs a message and saves little;
    - what lies in another block;
    - a block that shares a parameter with anything outside of it: one unit must hold a tensor: the root.

    Args:
        model: real, fake or meta parameters.

    Returns:
        Names for `get_submodule`; () where nothing repeats.
    """
    owners = _owners(model)
    classes: dict[type[nn.Module], dict[str, nn.Module]] = {}
    repeated: set[type[nn.Module]] = set()
    for name, module in model.named_modules():
        if not isinstance(module, _LISTS):
            continue
        children = {
            f"{name}.{child_name}".removeprefix("."): child
            for child_name, child in module.named_children()
            if any(True for _ in child.children())
        }
        kinds = [type(child) for child in children.values()]
        repeated.update(kind for kind in kinds if kinds.count(kind) >= 2)
        for child_name, child in children.items():
            if _is_alone(child, owners):
                classes.setdefault(type(child), {})[child_name] = child
    best: tuple[bool, int, tuple[str, ...]] = (False, 0, ())
    for kind in repeated:
        outermost = _outermost(classes.get(kind, {}))
        size = sum(p.numel() for block in outermost.values() for p in block.parameters())
        best = max(best, (not issubclass(kind, _LISTS), size, tuple(outermost)))
    return best[2]


def _outermost(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that lie in no other."""
    prefixes = tuple(f"{name}." for name in blocks)
    return {name: block for name, block in blocks.items() if not name.startswith(prefixes)}


def units(model: nn.Module, blocks: tuple[str, ...]) -> tuple[Unit, ...]:
    """What FSDP2 gathers together: the root first, then the blocks in order.

    Args:
        model: real, fake or meta parameters.
        blocks: names of those that are units; the root takes the rest.
    """
    inside = {name: model.get_submodule(name) for name in blocks}
    parts = [Unit(name, tuple(_parameters(block, frozenset()))) for name, block in inside.items()]
    root = Unit("", tuple(_parameters(model, frozenset(inside.values()))))
    return root, *parts


def _parameters(module: nn.Module, without: frozenset[nn.Module]) -> Iterator[nn.Parameter]:
    """Parameters of a module and of those below it but some, each once."""
    seen: dict[nn.Parameter, None] = {}
    _collect(module, without, set(), seen)
    return iter(seen)


def _collect(
    module: nn.Module, without: frozenset[nn.Module], visited: set[nn.Module], seen: dict[nn.Parameter, None]
) -> None:
    visited.add(module)
    for child in module.children():
        if child not in visited and child not in without:
            _collect(child, without, visited, seen)
    seen.update(dict.fromkeys(module.parameters(recurse=False)))


def _owners(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """The modules that list each parameter as their own."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return owners


def _is_alone(block: nn.Module, owners: dict[nn.Parameter, set[nn.Module]]) -> bool:
    """Whether no module outside the block has one of its parameters."""
    inside = set(block.modules())
    return all(owners[parameter] <= inside for parameter in block.parameters())
