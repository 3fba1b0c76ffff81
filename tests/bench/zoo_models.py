"""The zoo: real architectures with random weights, each as one training step that a small machine can run."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.bench import zoo_hf
from tests.bench.models import UNet
from tests.bench.zoo_networks import DiffusionUNet, RecurrentLM, noised


@dataclass(frozen=True)
class ZooStep:
    """What a training step needs; its loss is ``loss(model(inputs), targets)``.

    Attributes:
        model: in training mode, on the CPU.
        inputs: a tensor, a tuple of positional ones, or a dict of named ones.
        targets: a tensor, or None where the outputs are all that the loss reads.
        loss: of outputs and targets, a scalar. A function of a module, so that it can be pickled.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    loss: Callable[[Any, Any], torch.Tensor]


# Short name -> (library's name of it, entries of config that make it small). Whatever an entry does not say is the
# library's default, dropout included.
ZOO: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "resnet50": ("torchvision:resnet50", {"batch_size": 8}),
        "mobilenet_v3_large": ("torchvision:mobilenet_v3_large", {"batch_size": 8, "image_size": 128}),
        "efficientnet_b0": ("torchvision:efficientnet_b0", {"batch_size": 8}),
        "densenet121": ("torchvision:densenet121", {"batch_size": 8}),
        "shufflenet_v2": ("torchvision:shufflenet_v2_x1_0", {"batch_size": 8, "image_size": 128}),
        "regnet_y_400mf": ("torchvision:regnet_y_400mf", {"batch_size": 8, "image_size": 128}),
        "swin_t": ("torchvision:swin_t", {"batch_size": 4}),
        "deeplabv3_resnet50": ("torchvision:deeplabv3_resnet50", {"batch_size": 2, "aux_loss": True}),
        "googlenet": ("torchvision:googlenet", {"batch_size": 8, "image_size": 128}),
        "vgg16": ("timm:vgg16", {"batch_size": 4, "mlp_ratio": 0.125, "drop_rate": 0.5}),
        "convnext": ("timm:convnext_femto", {"batch_size": 8}),
        "vit": ("timm:vit_tiny_patch16_224", {"batch_size": 8, "image_size": 128}),
        "deit_distilled": ("timm:deit_tiny_distilled_patch16_224", {"batch_size": 8, "image_size": 128}),
        "mlp_mixer": ("timm:mixer_s32_224", {"batch_size": 8, "image_size": 128}),
        "resmlp": ("timm:resmlp_12_224", {"batch_size": 8}),
        "gmlp": ("timm:gmlp_ti16_224", {"batch_size": 8, "image_size": 128}),
        "coatnet": ("timm:coatnet_pico_rw_224", {"batch_size": 4}),
        "maxvit": ("timm:maxvit_pico_rw_256", {"batch_size": 4, "image_size": 128}),
        "efficientformer": ("timm:efficientformerv2_s0", {"batch_size": 4, "image_size": 128}),
        "swinv2": ("timm:swinv2_tiny_window8_256", {"batch_size": 4, "depths": (2, 2, 2, 2)}),
        "beit": (
            "timm:beit_base_patch16_224",
            {"batch_size": 8, "image_size": 128, "embed_dim": 256, "depth": 6, "num_heads": 8},
        ),
        "unet": ("own:unet", {"batch_size": 4, "width": 32}),
        "diffusion_unet": ("own:diffusion_unet", {"batch_size": 4, "image_size": 32}),
        "lstm": ("own:lstm", {"batch_size": 8, "sequence_length": 128}),
        "gru": ("own:gru", {"batch_size": 16, "sequence_length": 24, "tied": True}),
        "gpt2": ("hf:gpt2", {}),
        "bert": ("hf:bert", {}),
        "distilbert": ("hf:distilbert", {}),
        "roberta": ("hf:roberta", {}),
        "albert": ("hf:albert", {"num_hidden_layers": 6}),
        "t5": ("hf:t5", {"num_layers": 3, "num_decoder_layers": 3}),
        "llama": ("hf:llama", {"num_key_value_heads": 2}),
        "mistral": ("hf:mistral", {"sliding_window": 64}),
        "qwen2": ("hf:qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        "opt": ("hf:opt", {}),
        "gpt_neox": ("hf:gpt_neox", {}),
        "mixtral": ("hf:mixtral", {"num_hidden_layers": 2}),
        "whisper": ("hf:whisper", {"encoder_layers": 3, "decoder_layers": 3}),
        "clip": ("hf:clip", {"sequence_length": 64, "image_size": 128, "vision_config": {"patch_size": 16}}),
    }
)


def zoo_step(name: str, *, config: Mapping[str, Any] = MappingProxyType({}), seed: int = 0) -> ZooStep:
    """One training step of an architecture, the same one for the same arguments.

    Weights are random, those too that a library starts at zero, biases excepted.
    Torch's global generator is seeded: the weights are its, and a step taken right after draws the same dropout.

    Args:
        name: one of ZOO, or "torchvision:NAME", "timm:NAME", "hf:TYPE" with a model_type of transformers.
        config: `batch_size`, `image_size` (pixels a side), `sequence_length` (tokens); the rest goes to the
            library's builder or configuration. It comes before what ZOO says. The few models that exist at one
            size alone (maxvit_t, crossvit, halonet) need that `image_size`.
        seed: of weights and batch.

    Raises:
        ValueError: no such architecture, or an entry of `config` that it does not take.
        ImportError: its library is not installed.

    Example:
        >>> step = zoo_step("lstm", config={"batch_size": 2, "sequence_length": 8})
        >>> step.inputs.shape, step.model(step.inputs).shape
        (torch.Size([2, 8]), torch.Size([2, 8, 2000]))
    """
    long_name, entries = ZOO.get(name, (name, {}))
    library, _, member = long_name.partition(":")
    if not member or library not in _LIBRARIES:
        near = difflib.get_close_matches(name, [*ZOO], n=3) or [*ZOO]
        raise ValueError(
            f"the zoo has no {name!r}. Take one of {', '.join(near)}, or a library's name: "
            "torchvision:NAME, timm:NAME, hf:TYPE."
        )
    options = {**entries, **config}
    sizes = zoo_hf.Sizes(**{key: options.pop(key) for key in _SIZES if key in options})
    for key in _SIZES:
        value = getattr(sizes, key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}. Give a whole number of at least 1.")
    torch.manual_seed(seed)
    step = _LIBRARIES[library](member, options, sizes, torch.Generator().manual_seed(seed))
    _wake(step.model)
    return step


_SIZES = ("batch_size", "sequence_length", "image_size")


def _torchvision(
    name: str, options: Mapping[str, Any], sizes: zoo_hf.Sizes, generator: torch.Generator
) -> ZooStep:
    from torchvision import models

    _check_member(name, models.list_models(), library="torchvision")
    builder = models.get_model_builder(name)
    parts = builder.__module__.split(".")
    if {"detection", "optical_flow", "quantization", "video"} & {*parts}:
        raise ValueError(
            f"torchvision's {name!r} does not train on a batch of images with one target each. "
            "Take a model for classification or semantic segmentation."
        )
    fixed: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        fixed["weights_backbone"] = None  # else it would be downloaded
    if parts[-1] in ("googlenet", "inception"):
        fixed["init_weights"] = True  # the default, but without its warning
    if parts[-1] == "vision_transformer":
        fixed["image_size"] = sizes.image_size
    model = _built(name, functools.partial(builder, **fixed), options).train()
    images = _images(sizes, generator)
    if "segmentation" in parts:
        num_classes = options.get("num_classes", 21)
        shape = (sizes.batch_size, sizes.image_size, sizes.image_size)
        return ZooStep(
            model, images, torch.randint(0, num_classes, shape, generator=generator), segmentation_loss
        )
    return ZooStep(model, images, _classes(options, sizes, generator), classification_loss)


def _timm(name: str, options: Mapping[str, Any], sizes: zoo_hf.Sizes, generator: torch.Generator) -> ZooStep:
    import timm

    _check_member(name, timm.list_models(), library="timm")
    fixed: dict[str, Any] = {"pretrained": False}
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is not None and pretrained.fixed_input_size:
        fixed["img_size"] = sizes.image_size
    model = _built(name, functools.partial(timm.create_model, name, **fixed), options).train()
    distil = getattr(model, "set_distilled_training", None)
    if distil is not None:
        distil(True)  # two heads, each with a loss of its own
    return ZooStep(model, _images(sizes, generator), _classes(options, sizes, generator), classification_loss)


def _hf(name: str, options: Mapping[str, Any], sizes: zoo_hf.Sizes, generator: torch.Generator) -> ZooStep:
    return ZooStep(*zoo_hf.hf_step(name, config=options, sizes=sizes, generator=generator))


def _own(name: str, options: Mapping[str, Any], sizes: zoo_hf.Sizes, generator: torch.Generator) -> ZooStep:
    networks = {
        "unet": UNet,
        "diffusion_unet": DiffusionUNet,
        "lstm": functools.partial(RecurrentLM, "lstm"),
        "gru": functools.partial(RecurrentLM, "gru"),
    }
    _check_member(name, [*networks], library="the zoo")
    model = _built(name, networks[name], options).train()
    if isinstance(model, RecurrentLM):
        shape = (sizes.batch_size, sizes.sequence_length)
        tokens = torch.randint(0, model.vocabulary, shape, generator=generator)
        return ZooStep(model, tokens, tokens, token_loss)
    images = _images(sizes, generator)
    if name == "unet":
        masks = torch.randint(
            0, 2, (sizes.batch_size, 1, sizes.image_size, sizes.image_size), generator=generator
        )
        return ZooStep(model, images, masks.float(), F.binary_cross_entropy_with_logits)
    noise = torch.randn(images.shape, generator=generator)
    times = torch.randint(0, 1000, (sizes.batch_size,), generator=generator)
    return ZooStep(model, {"noisy": noised(images, noise, times), "times": times}, noise, F.mse_loss)


_LIBRARIES: Mapping[str, Callable[..., ZooStep]] = MappingProxyType(
    {"torchvision": _torchvision, "timm": _timm, "hf": _hf, "own": _own}
)


def _check_member(name: str, members: list[str], *, library: str) -> None:
    if name not in members:
        near = difflib.get_close_matches(name, members, n=3)
        raise ValueError(
            f"{library} has no model {name!r}. "
            + (f"Did you mean {', '.join(near)}?" if near else "Take one of its list.")
        )


def _built(name: str, builder: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    try:
        return builder(**options)
    except TypeError as error:
        raise ValueError(f"{name!r} does not take {dict(options)}: {error}. Leave that entry out.") from error


def _wake(model: nn.Module) -> None:
    """Weights that start at zero become normal ones: behind them every gradient of a first step would be zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias") and not parameter.any():
                parameter.normal_(std=0.02)


def _images(sizes: zoo_hf.Sizes, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(sizes.batch_size, 3, sizes.image_size, sizes.image_size, generator=generator)


def _classes(options: Mapping[str, Any], sizes: zoo_hf.Sizes, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, options.get("num_classes", 1000), (sizes.batch_size,), generator=generator)


def classification_loss(outputs: Any, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the logits [B, classes]; of further heads 0.3 each (Szegedy et al., 2015, section 5)."""
    if isinstance(outputs, torch.Tensor):
        return F.cross_entropy(outputs, classes)
    main, *others = [F.cross_entropy(logits, classes) for logits in outputs if logits is not None]
    return main + 0.3 * sum(others)


def segmentation_loss(outputs: Mapping[str, torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every pixel's logits; of the auxiliary head a half, as torchvision's reference has it."""
    loss = F.cross_entropy(outputs["out"], classes)
    return loss + 0.5 * F.cross_entropy(outputs["aux"], classes) if "aux" in outputs else loss


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token [B, T] given those before it."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
