"""Training steps of transformers' architectures at a small size, from nothing but the type's name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.bench.gpt2_small import next_token_loss

Loss = Callable[[Any, Any], torch.Tensor]

# The words that configurations have for one thing; the first that a user sets decides.
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
INNER_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "hidden_dim",
    "d_ff",
    "d_inner",
    "dff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
OTHER_WIDTHS = (
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "word_embed_proj_dim",
    "pooler_hidden_size",
    "pooler_output_size",
    "attention_hidden_size",
)
HEAD_WIDTHS = ("head_dim", "d_kv", "d_head", "query_pre_attn_scalar")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "context_length")
STAGES = ("depths", "hidden_sizes", "num_block_repeats")

# What a type needs to fit the sizes below.
OF_ONE_TYPE: Mapping[str, Mapping[str, Any]] = {
    "codegen": {"n_head": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mobilebert": {"num_attention_heads": 4},
    "reformer": {"axial_pos_embds_dim": (64, 128), "axial_pos_shape": (8, 16)},
    "squeezebert": {"embedding_size": 192},
}

DEFAULT_WIDTH = 192
DEFAULT_HEADS = 6
DEFAULT_LAYERS = 4
NUM_TOKENS = 1000
NUM_LABELS = 100
SAMPLES_PER_TOKEN = 100


@dataclass(frozen=True)
class Sizes:
    """Of one batch. A sound has a frame or SAMPLES_PER_TOKEN samples a token."""

    batch_size: int = 8
    sequence_length: int = 128
    image_size: int = 96


def hf_step(
    model_type: str, *, config: Mapping[str, Any], sizes: Sizes, generator: torch.Generator
) -> tuple[nn.Module, Any, Any, Loss]:
    """Model, inputs, targets and loss of a `model_type` of transformers' AutoConfig, with random weights.

    What `config` does not name gets a small size where the type has a field of a known name; the rest stays the
    library's. Random numbers that a model draws on the host (layers left out, spans of sound masked) are off
    unless set, because no seed of torch repeats them all.

    Args:
        model_type: such as "gpt2".
        config: entries of the type's configuration, those of its parts as mappings ({"text_config": {...}}).
        sizes: of the batch.
        generator: of the inputs. The weights are torch's global generator's.

    Returns:
        A model in training mode, and a step for its most specific head: sequence to sequence, masked language
        model, causal language model, contrast of images and texts, class of an image, class of a sound; else the
        bare model, with the mean of its outputs.

    Raises:
        ValueError: no such type or key, or a type whose inputs are not known here.
        ImportError: transformers is not installed.
    """
    import transformers as hf
    from huggingface_hub.errors import StrictDataclassError

    hf.logging.set_verbosity_error()
    if model_type not in hf.CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(hf.CONFIG_MAPPING), n=3)
        raise ValueError(
            f"transformers {hf.__version__} has no model type {model_type!r}. "
            f"{'Did you mean ' + ', '.join(near) + '? ' if near else ''}Take one of AutoConfig's."
        )
    defaults = hf.CONFIG_MAPPING[model_type]()
    _check_keys(defaults, config, model_type=model_type)
    values = _shrunk(defaults, given=config, sizes=sizes)
    try:
        small = hf.AutoConfig.for_model(model_type, **values)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(
            f"no configuration of {model_type!r} has {values}: {error}. Set other entries to fit."
        ) from error
    model, loss = _model(small)
    inputs, targets = _batch(model, loss, sizes=sizes, generator=generator)
    return model.train(), inputs, targets, loss


def _check_keys(defaults: Any, given: Mapping[str, Any], *, model_type: str) -> None:
    known = {*defaults.to_dict(), *defaults.attribute_map, "num_labels", "attn_implementation"}
    for key in given:
        if key not in known and not hasattr(defaults, key):
            near = difflib.get_close_matches(key, sorted(known), n=3)
            raise ValueError(
                f"the configuration of {model_type!r} has no entry {key!r}. "
                f"{'Did you mean ' + ', '.join(near) + '?' if near else 'Take one of its fields.'}"
            )


def _shrunk(defaults: Any, *, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Arguments of a small configuration: what is given, and sizes for the fields that are not."""
    aliases = defaults.attribute_map
    parameters = inspect.signature(type(defaults)).parameters
    given = {key if key in parameters else aliases.get(key, key): value for key, value in given.items()}
    given = {**OF_ONE_TYPE.get(defaults.model_type, {}), **given}
    special = {key: value for key, value in defaults.to_dict().items() if key.endswith("_token_id")}
    fields = {key: getattr(defaults, key) for key in parameters if hasattr(defaults, key)} | special
    values: dict[str, Any] = {"num_labels": NUM_LABELS} if not defaults.sub_configs else {}
    if isinstance(getattr(defaults, "use_cache", None), bool):
        values["use_cache"] = False
    if defaults.is_encoder_decoder and getattr(defaults, "decoder_start_token_id", None) is None:
        values["decoder_start_token_id"] = 0
    pyramid = any(_is_list(fields.get(key)) for key in STAGES)
    values |= _stage_sizes(fields, sizes) if pyramid else _widths(fields, given)
    values |= _lengths(fields, sizes) | _tokens(fields, given)
    for key in defaults.sub_configs:
        part = getattr(defaults, key, None)
        if part is not None:
            inner = _shrunk(part, given=given.get(key, {}), sizes=sizes)
            values[key] = {"model_type": part.model_type, **inner}
    return values | {key: value for key, value in given.items() if key not in defaults.sub_configs}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _stage_sizes(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Of a pyramid of stages: at most two blocks each, of the library's widths; windows that fill the last one."""
    values: dict[str, Any] = {
        key: [min(depth, 2) for depth in fields[key]]
        for key in ("depths", "num_block_repeats")
        if _is_list(fields.get(key))
    }
    if _is_count(fields.get("window_size")):
        values["window_size"] = max(1, min(fields["window_size"], sizes.image_size // 32))
    return values


def _widths(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Widths, heads and layers that fit each other and what is given."""
    heads = next((given[key] for key in HEADS if key in given), None)
    width = next((given[key] for key in WIDTHS if key in given), None)
    if width is None:
        width = DEFAULT_WIDTH if heads is None or DEFAULT_WIDTH % heads == 0 else 32 * heads
    if heads is None:
        heads = next(count for count in (DEFAULT_HEADS, 4, 3, 2, 1) if width % count == 0)
    grouped = any(fields.get(k) and fields[k] < fields.get("num_attention_heads", 0) for k in KEY_HEADS)
    key_heads = heads // 2 if grouped and heads % 2 == 0 else heads
    head_width = width * (fields["expand"] if "num_heads" in fields and "expand" in fields else 1) // heads
    wanted = {
        **dict.fromkeys((*WIDTHS, *OTHER_WIDTHS), width),
        **dict.fromkeys(HEADS, heads),
        **dict.fromkeys(LAYERS, DEFAULT_LAYERS),
        **dict.fromkeys(INNER_WIDTHS, 4 * width),
        **dict.fromkeys(HEAD_WIDTHS, head_width),
        **dict.fromkeys(EXPERTS, 4),
    }
    most = {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_groups": 2 if heads % 2 == 0 else 1,
        "rotary_dim": head_width,
        "output_hidden_size": width,
    }
    return {
        **{key: value for key, value in wanted.items() if _is_count(fields.get(key))},
        **{key: min(fields[key], value) for key, value in most.items() if _is_count(fields.get(key))},
        **{key: key_heads for key in KEY_HEADS if key in fields},
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _lengths(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Of images, sounds and texts; nothing random on the host."""
    values: dict[str, Any] = {
        key: max(fields[key], sizes.sequence_length + 2) for key in POSITIONS if _is_count(fields.get(key))
    }
    if _is_count(fields.get("image_size")):
        values["image_size"] = sizes.image_size
    elif _is_list(fields.get("image_size")):
        values["image_size"] = [sizes.image_size] * 2
    if "num_mel_bins" in fields and "max_source_positions" in fields:
        values["max_source_positions"] = sizes.sequence_length
    if "num_mel_bins" in fields and "max_length" in fields:
        values["max_length"] = sizes.sequence_length
    drawn_on_host = ("layerdrop", "mask_time_prob", "mask_feature_prob")
    values |= {key: 0.0 for key in fields if key.endswith(drawn_on_host)}
    return values | ({"apply_spec_augment": False} if "apply_spec_augment" in fields else {})


def _tokens(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A small vocabulary, and the special tokens that it has no place for moved to its beginning."""
    if not _is_count(fields.get("vocab_size")):
        return {}
    count = given.get("vocab_size", min(NUM_TOKENS, fields["vocab_size"]))
    special = {
        key: 0 if key.startswith("pad") else 2
        for key, value in fields.items()
        if key.endswith("_token_id") and isinstance(value, int) and value >= count
    }
    return {"vocab_size": count, **special}


def _model(config: Any) -> tuple[nn.Module, Loss]:
    """The model with the most specific head that the configuration's type has, and the loss of that head."""
    import transformers as hf

    heads: list[tuple[Any, Loss]] = [
        (hf.MODEL_FOR_MASKED_LM_MAPPING, next_token_loss),
        (hf.MODEL_FOR_CAUSAL_LM_MAPPING, next_token_loss),
        (hf.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING, contrastive_loss),
        (hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, class_loss),
        (hf.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, class_loss),
    ]
    if config.is_encoder_decoder:
        heads = [
            (hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, returned_loss),
            (hf.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, returned_loss),
        ]
    elif getattr(config, "is_decoder", False):
        heads = heads[1:]
    for mapping, loss in [*heads, (hf.MODEL_MAPPING, hidden_loss)]:
        if type(config) in mapping:
            found = mapping[type(config)]
            return (found[0] if _is_list(found) else found)(config), loss
    raise ValueError(f"transformers has no model for a bare {config.model_type!r}. Take a type of its parts.")


def _batch(
    model: Any, loss: Loss, *, sizes: Sizes, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Inputs and targets of a model, by the name of its main input and by its loss."""
    config = model.config

    def tokens() -> torch.Tensor:
        count = getattr(config.get_text_config(), "vocab_size", NUM_TOKENS)
        first = min(5, count - 1)  # past the special ones
        return torch.randint(first, count, (sizes.batch_size, sizes.sequence_length), generator=generator)

    def images(part: Any) -> torch.Tensor:
        size = getattr(part, "image_size", None) or sizes.image_size
        sides = [size, size] if isinstance(size, int) else [*size]
        return torch.randn(sizes.batch_size, getattr(part, "num_channels", 3), *sides, generator=generator)

    if loss is contrastive_loss:
        return {"input_ids": tokens(), "pixel_values": images(config.vision_config)}, None
    main = model.main_input_name
    if main == "input_ids":
        inputs = {main: tokens()}
    elif main == "pixel_values":
        inputs = {main: images(config)}
    elif main in ("input_values", "input_features"):
        inputs = {main: torch.randn(_sound_shape(config, sizes), generator=generator)}
    else:
        raise ValueError(
            f"{type(model).__name__} has the main input {main!r}, and only input_ids, pixel_values, "
            "input_values and input_features are known here. Take another type."
        )
    if loss is returned_loss:
        return inputs | {"labels": tokens()}, None
    if loss is class_loss:
        return inputs, torch.randint(0, config.num_labels, (sizes.batch_size,), generator=generator)
    return inputs, inputs["input_ids"] if loss is next_token_loss else None


def _sound_shape(config: Any, sizes: Sizes) -> tuple[int, ...]:
    """Samples [B, S], frames [B, T, bins], or Whisper's frames [B, bins, 2 T]."""
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None and hasattr(config, "max_source_positions"):
        return sizes.batch_size, bins, 2 * config.max_source_positions
    if bins is not None and hasattr(config, "max_length"):
        return sizes.batch_size, config.max_length, bins
    for key in ("feature_projection_input_dim", "input_feat_per_channel"):
        if hasattr(config, key):
            return sizes.batch_size, sizes.sequence_length, getattr(config, key)
    return sizes.batch_size, SAMPLES_PER_TOKEN * sizes.sequence_length


def returned_loss(outputs: Any, targets: None) -> torch.Tensor:
    """The loss that a model given labels returns."""
    return outputs.loss


def class_loss(outputs: Any, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the logits [B, classes]."""
    return F.cross_entropy(outputs.logits, classes)


def contrastive_loss(outputs: Any, targets: None) -> torch.Tensor:
    """Cross-entropy of finding each text's image and each image's text (Radford et al., 2021)."""
    logits = outputs.logits_per_text
    pairs = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


def hidden_loss(outputs: Any, targets: None) -> torch.Tensor:
    """Mean hyperbolic tangent of the last hidden state; a plain mean has no gradient behind a layer norm."""
    return outputs[0].tanh().mean()
