"""Squared norms of the gradients of single examples: the smallest small batch, on one worker alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchestrator.batch_size.coupled_examples import coupling_layers, refusal
from orchestrator.batch_size.gradient_norms import GradientNorms, Grouping
from orchestrator.batch_size.layer_formulas import UnsupportedLayerError
from orchestrator.batch_size.layer_gradients import LayerGradients
from planner.lower.trace import pytree

Method = Literal["closed_form", "torch_func"]


@dataclasses.dataclass(frozen=True)
class PerExample:
    """Norms of one batch's gradients, example by example.

    Attributes:
        sqnorms: squared norm of each example's gradient, float64, shape [B, groups].
        mean_by_group: squared norm of their mean, float64, shape [groups].
        method: how they were computed.
        reason: why not in closed form; "" if they were.
    """

    sqnorms: Tensor
    mean_by_group: Tensor
    method: Method
    reason: str

    def norms(self) -> GradientNorms:
        """For `NoiseScaleEstimator.observe` with a small batch of 1 and a big batch of B."""
        return GradientNorms(self.sqnorms.mean(0), self.mean_by_group)


def per_example(
    step: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    method: Literal["auto"] | Method = "auto",
    groups: Sequence[Iterable[nn.Parameter]] = (),
    chunk: int = 32,
) -> PerExample:
    """Measure the gradient of every example of a batch; `.grad` of the parameters stays as it is.

    In closed form it is one forward and one backward over the batch, with the layers' inputs and output gradients
    in place of gradients of examples; see `layer_gradients`. Otherwise torch.func maps the gradient of one
    example over the batch, which makes `chunk` gradients at a time and keeps their sum.

    A model in the step's training mode draws dropout, as training does. The unit is what lies along dim 0: for
    sequences of T tokens a batch of B has B examples, not B T.

    Args:
        step: (inputs, targets) -> mean loss over the batch, such as `planner.step.StepModule`. Not wrapped, sharded
            or planned.
        inputs: tensors whose dim 0 is the batch, in any structure.
        targets: likewise.
        method: "auto" takes the closed form where every use of a parameter has one.
        groups: of parameters, measured apart as well; see `Grouping`.
        chunk: examples at a time with torch.func, >= 1.

    Raises:
        ValueError: examples are coupled by batch norm, the batch has fewer than 2, or chunk < 1.
        UnsupportedLayerError: "closed_form" was asked for and a parameter is used in a way that has none.

    Reference: Goodfellow, 2015, arXiv 1510.01799 (linear layers); Rochette et al., 2019, arXiv 1912.06015
        (convolution); Li et al., 2022, arXiv 2110.05679 (sequences).
    """
    coupled = coupling_layers(step)
    if coupled:
        raise ValueError(refusal(coupled))
    sizes = {len(leaf) for leaf in pytree.tree_leaves((inputs, targets)) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or min(sizes) < 2 or chunk < 1:
        raise ValueError(
            f"need at least 2 examples along dim 0 of every input and target, and chunk >= 1; got sizes "
            f"{sorted(sizes)} and chunk {chunk!r}. One example has no noise to measure"
        )
    grouping, (num_examples,) = Grouping(step.parameters(), groups), sizes
    reason = ""
    if method != "torch_func":
        try:
            squares, mean = _closed_form(step, inputs, targets, grouping, num_examples)
            return _result(grouping, squares, mean, "closed_form", "")
        except UnsupportedLayerError as error:
            if method == "closed_form":
                raise
            reason = str(error)
    squares, mean = _mapped(step, inputs, targets, grouping, num_examples, chunk)
    return _result(grouping, squares, mean, "torch_func", reason)


def _result(grouping: Grouping, squares: Tensor, mean: Tensor, method: Method, reason: str) -> PerExample:
    """Add up parameters: squares [B, P] and mean [P] to groups."""
    by_group = torch.stack([grouping.add_up(row) for row in squares])
    return PerExample(by_group, grouping.add_up(mean), method, reason)


def _closed_form(
    step: nn.Module, inputs: Any, targets: Any, grouping: Grouping, num_examples: int
) -> tuple[Tensor, Tensor]:
    layers = LayerGradients(grouping.parameters, num_examples)
    with torch.enable_grad():
        with layers:
            loss = step(inputs, targets)
        gradients = torch.autograd.grad(loss, grouping.parameters, allow_unused=True)
    mean = torch.stack(
        [torch.zeros(()) if g is None else g.detach().double().square().sum() for g in gradients]
    )
    # The loss is the mean over B examples: what reached the layers is 1 / B of the examples' own gradients.
    return layers.squares() * num_examples**2, mean.double()


def _mapped(
    step: nn.Module, inputs: Any, targets: Any, grouping: Grouping, num_examples: int, chunk: int
) -> tuple[Tensor, Tensor]:
    names = {parameter: name for name, parameter in step.named_parameters()}
    trained = {names[parameter]: parameter.detach() for parameter in grouping.parameters}

    def loss_of(parameters: dict[str, Tensor], example: Any) -> Tensor:
        one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, example)
        return functional_call(step, parameters, one)

    axes = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, (inputs, targets))
    gradient_of = vmap(grad(loss_of), in_dims=(None, axes), randomness="different")
    total = {name: torch.zeros_like(value) for name, value in trained.items()}
    squares: list[Tensor] = []
    for start in range(0, num_examples, chunk):
        part = pytree.tree_map(
            lambda leaf: leaf[start : start + chunk] if isinstance(leaf, Tensor) else leaf,  # noqa: B023
            (inputs, targets),
        )
        with sdpa_kernel(SDPBackend.MATH):  # the one that maps; others would run example by example
            gradients = gradient_of(trained, part)
        squares.append(
            torch.stack([gradients[name].flatten(1).double().square().sum(1) for name in trained], 1)
        )
        for name in trained:
            total[name] += gradients[name].sum(0)
    mean = torch.stack([(value / num_examples).double().square().sum() for value in total.values()])
    return torch.cat(squares), mean
