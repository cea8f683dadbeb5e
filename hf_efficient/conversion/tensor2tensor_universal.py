"""Universal Transformers of tensor2tensor: what their settings and their weights' names become."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..models.universal_transformer import (
    UniversalTransformerConfig,
    UniversalTransformerEncoderModel,
    UniversalTransformerForCausalLM,
    UniversalTransformerForConditionalGeneration,
    UniversalTransformerModel,
)
from .tensor2tensor_names import (
    Renaming,
    attention_names,
    choose,
    norm_names,
    norm_position,
    same,
    smoothing_over_all,
    transposed,
)

# What each kind of model becomes. The first two begin with embedded inputs, the others with ids.
ENCODER, DECODER, ENCODER_DECODER, LANGUAGE_MODEL = "ut_encoder", "ut_decoder", "ut_full", "ut_full_lm"
KINDS = (ENCODER, DECODER, ENCODER_DECODER, LANGUAGE_MODEL)

# Keys of the settings that every model has, those of halting, and those of some kinds.
COMMON_KEYS = frozenset(
    {"kind", "hidden", "heads", "filter", "ln_eps", "pre", "post", "ffn", "recurrence", "rec_steps", "blocks_per_step"}
    | {"position_signal", "position_start", "step_signal", "step_signal_type", "signal_combine"}
)
HALTING_KEYS = frozenset({"act_type", "act_max_steps", "act_eps", "act_loss_weight"})
KIND_KEYS = {
    ENCODER: frozenset(),
    DECODER: frozenset({"cross"}),
    ENCODER_DECODER: frozenset({"vocab", "label_smoothing"}),
    LANGUAGE_MODEL: frozenset({"vocab", "label_smoothing"}),
}
# A language model may say that it has no cross-attention.
OPTIONAL_KEYS = {kind: frozenset({"mix", "cross"} if kind == LANGUAGE_MODEL else {"mix"}) for kind in KINDS}
RECURRENCES = ("basic", "act")
NORM_POSITIONS = {("n", "da"): "pre", ("none", "dan"): "post"}

# Settings of halting; "basic" and "accumulated" are tensor2tensor's words.
HALTING_SETTINGS = {
    "halting": "act",
    "halted_states": "evolving",
    "force_final_halt": False,
    "halting_norm": False,
}
HALTING_TYPES = {
    "basic": {"act_output": "interpolation"},
    "accumulated": {"act_output": "weighted_sum"},
    "global": {"act_output": "interpolation", "halting_scope": "sequence"},
}


def read_settings(cfg: Mapping[str, Any]) -> tuple[type[PreTrainedModel], UniversalTransformerConfig]:
    """As `tensor2tensor.read_settings`, for one of `KINDS`."""
    kind = cfg["kind"]
    if cfg.get("recurrence") not in RECURRENCES:
        UniversalTransformerConfig(recurrence=cfg.get("recurrence"))  # refuses it by name
    is_halting = cfg["recurrence"] == "act"
    _check_keys(cfg, COMMON_KEYS | KIND_KEYS[kind] | (HALTING_KEYS if is_halting else frozenset()))
    settings = {
        "hidden_size": cfg["hidden"],
        "num_attention_heads": cfg["heads"],
        "intermediate_size": cfg["filter"],
        "layer_norm_eps": cfg["ln_eps"],
        "max_steps": cfg["act_max_steps"] if is_halting else cfg["rec_steps"],
        "num_layers_in_group": cfg["blocks_per_step"],
        "transition": choose(cfg, "ffn", {"fc": "feed_forward", "sepconv": "separable_convolution"}),
        "norm_position": norm_position(cfg, NORM_POSITIONS),
    }
    model_class, vocabulary = _read_kind(cfg)
    settings |= vocabulary | _read_coordinates(cfg) | _read_mix(cfg) | (_read_halting(cfg) if is_halting else {})
    settings["count_padding"] = True
    return model_class, UniversalTransformerConfig(**settings)


def _check_keys(cfg: Mapping[str, Any], needed: frozenset[str]) -> None:
    missing, unknown = sorted(needed - cfg.keys()), sorted(cfg.keys() - needed - OPTIONAL_KEYS[cfg["kind"]])
    if missing or unknown:
        raise ValueError(f"cfg is no {cfg['kind']} with recurrence={cfg['recurrence']!r}: {missing=}, {unknown=}.")


def _read_kind(cfg: Mapping[str, Any]) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The class, which stacks it has, and its vocabulary."""
    kind = cfg["kind"]
    nothing = {"vocab_size": 1, "eos_token_id": None}
    if kind == ENCODER:
        return UniversalTransformerEncoderModel, nothing | {"is_encoder_decoder": False}
    if kind == DECODER:
        has_encoder = choose(cfg, "cross", {True: True, False: False})
        stacks = {"is_encoder_decoder": has_encoder, "is_decoder": not has_encoder}
        return UniversalTransformerModel, nothing | stacks
    vocabulary = {"vocab_size": cfg["vocab"], "label_smoothing": smoothing_over_all(cfg), "zero_pad_embedding": True}
    if kind == LANGUAGE_MODEL:
        choose(cfg, "cross", {None: False, False: False})
        return UniversalTransformerForCausalLM, vocabulary | {"is_decoder": True}
    return UniversalTransformerForConditionalGeneration, vocabulary | {"encoder_input_bias": True}


def _read_coordinates(cfg: Mapping[str, Any]) -> dict[str, Any]:
    has_step_signal = choose(cfg, "step_signal", {True: True, False: False})
    step_signal = choose(cfg, "step_signal_type", {"learned": "learned", "sinusoid": "sinusoid"})
    return {
        "position_signal": choose(cfg, "position_signal", {True: "sinusoid", False: "none"}),
        "step_signal": step_signal if has_step_signal else "none",
        "step_position_offset": choose(cfg, "position_start", {0: False, None: False, "step": True}),
        "coordinate_combination": choose(cfg, "signal_combine", {"add": "add", "concat": "concat"}),
    }


def _read_mix(cfg: Mapping[str, Any]) -> dict[str, int]:
    """Ordinary blocks around the recurrence, which come as a phrase: "before+after 1 layer each"."""
    if "mix" not in cfg:
        return {}
    phrase = re.fullmatch(r"(before|after|before\+after) (\d+) layers?(?: each)?", str(cfg["mix"]))
    if phrase is None:
        raise ValueError(f"mix={cfg['mix']!r} has no counterpart; known is 'before+after 1 layer each' and the like.")
    sides, number = phrase[1].split("+"), int(phrase[2])
    return {"num_prelude_layers": number * ("before" in sides), "num_coda_layers": number * ("after" in sides)}


def _read_halting(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return (
        HALTING_SETTINGS
        | choose(cfg, "act_type", HALTING_TYPES)
        | {"halting_threshold": 1 - cfg["act_eps"], "ponder_cost": cfg["act_loss_weight"]}
    )


# --- weights -------------------------------------------------------------------------------------------------


def _table(weight: Tensor) -> Tensor:
    """(T, 1, 1, C) to (T, C)."""
    return weight.flatten(1)


def _depthwise(weight: Tensor) -> Tensor:
    """(width, 1, C, 1) to (C, 1, width)."""
    return weight[:, 0].permute(1, 2, 0)


# Name in a stack or a block, ours, and how the tensor changes.
STACK_NAMES: dict[str, Renaming] = {
    "step_embed": ("coordinates.step_embedding.weight", _table),
    "dense.w": ("coordinates.projection.weight", transposed),
    "halt.w": ("halting.projection.weight", transposed),
    "halt.b": ("halting.projection.bias", same),
} | norm_names("final_ln", "final_norm")
SUBLAYERS = {"self_attn": "self_attention", "cross_attn": "cross_attention", "ffn": "transition"}
BLOCKS = {"pre": "prelude", "block": "group", "post": "coda"}


def _sublayer_names() -> dict[str, Renaming]:
    names: dict[str, Renaming] = {}
    for old, new in SUBLAYERS.items():
        names |= norm_names(f"{old}.ln", f"{new}_norm")
    for attention in ("self_attn", "cross_attn"):
        names |= attention_names(attention, SUBLAYERS[attention])
    for number, (dense, convolution) in {1: ("up_proj", "first"), 2: ("down_proj", "second")}.items():
        names[f"ffn.w{number}"] = (f"transition.{dense}.weight", transposed)
        names[f"ffn.b{number}"] = (f"transition.{dense}.bias", same)
        names[f"ffn.sep{number}.dw"] = (f"transition.{convolution}_depthwise.weight", _depthwise)
        names[f"ffn.sep{number}.pw"] = (f"transition.{convolution}_pointwise.weight", transposed)
        names[f"ffn.sep{number}.b"] = (f"transition.{convolution}_pointwise.bias", same)
    return names


SUBLAYER_NAMES = _sublayer_names()


def find(name: str) -> Renaming | None:
    """Our name of a weight in a stack, and how its shape changes; None for one that no stack has."""
    if name in STACK_NAMES:
        return STACK_NAMES[name]
    block = re.fullmatch(r"(pre|block|post)(\d+)\.(.+)", name)
    if block is None or block[3] not in SUBLAYER_NAMES:
        return None
    new, change = SUBLAYER_NAMES[block[3]]
    return f"{BLOCKS[block[1]]}.{block[2]}.{new}", change
