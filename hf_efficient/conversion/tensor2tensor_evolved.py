"""Evolved Transformers of tensor2tensor: what their settings and their weights' names become."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..models.evolved_transformer import (
    EvolvedTransformerConfig,
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerModel,
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
ENCODER, DECODER, ENCODER_DECODER, LANGUAGE_MODEL = "et_encoder", "et_decoder", "et_full", "et_full_lm"
KINDS = (ENCODER, DECODER, ENCODER_DECODER, LANGUAGE_MODEL)

# Keys of the settings that every model has, those of some kinds, and those that may be left out.
COMMON_KEYS = frozenset({"kind", "hidden", "heads", "layers", "ln_eps", "pre", "post"})
KIND_KEYS = {
    ENCODER: frozenset(),
    DECODER: frozenset({"cross", "wide_heads"}),
    ENCODER_DECODER: frozenset({"wide_heads", "vocab", "label_smoothing"}),
    LANGUAGE_MODEL: frozenset({"wide_heads", "vocab", "label_smoothing"}),
}
# `filter` is read by nothing in tensor2tensor's Evolved Transformer: all widths follow from `hidden`.
OPTIONAL_KEYS = {kind: frozenset({"filter"}) for kind in (ENCODER, DECODER)} | {
    kind: frozenset({"filter", "cross", "position_signal"}) for kind in (ENCODER_DECODER, LANGUAGE_MODEL)
}
NORM_POSITIONS = {("n", "da"): "pre"}


# --- settings ------------------------------------------------------------------------------------------------


def read_settings(cfg: Mapping[str, Any]) -> tuple[type[PreTrainedModel], EvolvedTransformerConfig]:
    """As `tensor2tensor.read_settings`, for one of `KINDS`."""
    kind = cfg["kind"]
    needed = COMMON_KEYS | KIND_KEYS[kind]
    missing, unknown = sorted(needed - cfg.keys()), sorted(cfg.keys() - needed - OPTIONAL_KEYS[kind])
    if missing or unknown:
        raise ValueError(f"cfg is no {kind}: {missing=}, {unknown=}.")
    norm_position(cfg, NORM_POSITIONS)
    settings = {
        "hidden_size": cfg["hidden"],
        "num_attention_heads": cfg["heads"],
        "num_wide_attention_heads": cfg.get("wide_heads"),
        "num_encoder_layers": cfg["layers"],
        "num_decoder_layers": cfg["layers"],
        "layer_norm_eps": cfg["ln_eps"],
    }
    model_class, more_settings = _read_bare(cfg) if kind in (ENCODER, DECODER) else _read_whole(cfg)
    return model_class, EvolvedTransformerConfig(**(settings | more_settings))


def _read_bare(cfg: Mapping[str, Any]) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """A stack alone. tensor2tensor adds the positions before it."""
    nothing = {"vocab_size": 1, "eos_token_id": None, "position_signal": "none"}
    if cfg["kind"] == ENCODER:
        return EvolvedTransformerModel, nothing | {"is_encoder_decoder": False}
    has_encoder = choose(cfg, "cross", {True: True, False: False})
    return EvolvedTransformerModel, nothing | {"is_encoder_decoder": has_encoder, "is_decoder": not has_encoder}


def _read_whole(cfg: Mapping[str, Any]) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """A model with embeddings."""
    settings = {
        "vocab_size": cfg["vocab"],
        "label_smoothing": smoothing_over_all(cfg),
        "zero_pad_embedding": True,
        "position_signal": choose(cfg, "position_signal", {None: "sinusoid", True: "sinusoid", False: "none"}),
    }
    if cfg["kind"] == LANGUAGE_MODEL:
        choose(cfg, "cross", {None: False, False: False})
        return EvolvedTransformerForCausalLM, settings | {"is_decoder": True}
    choose(cfg, "cross", {None: True, True: True})
    return EvolvedTransformerForConditionalGeneration, settings | {"encoder_input_bias": True}


# --- weights -------------------------------------------------------------------------------------------------


def _depthwise(weight: Tensor) -> Tensor:
    """(width, C, 1) to (C, 1, width)."""
    return weight.permute(1, 2, 0)


def _kernel(weight: Tensor) -> Tensor:
    """(width, in, out) to (out, in, width)."""
    return weight.permute(2, 1, 0)


def _dense_names(old: str, new: str) -> dict[str, Renaming]:
    return {f"{old}.w": (f"{new}.weight", transposed), f"{old}.b": (f"{new}.bias", same)}


def _separable_names(old: str, new: str) -> dict[str, Renaming]:
    return {
        f"{old}.dw": (f"{new}.depthwise.weight", _depthwise),
        f"{old}.pw": (f"{new}.pointwise.weight", transposed),
        f"{old}.b": (f"{new}.pointwise.bias", same),
    }


# Names in a block, of the encoder or the decoder, ours, and how the tensor changes.
BLOCK_NAMES: dict[str, Renaming] = {
    **norm_names("glu.ln", "glu_norm"),
    **_dense_names("glu.value", "glu.value_proj"),
    **_dense_names("glu.gate", "glu.gate_proj"),
    **norm_names("branch.ln", "branch_norm"),
    **_dense_names("branch.dense", "branches.dense"),
    "branch.conv3.w": ("branches.convolution.weight", _kernel),
    "branch.conv3.b": ("branches.convolution.bias", same),
    **norm_names("branch.ln_1", "branches.norm"),
    **_separable_names("branch.sep9", "branches.separable"),
    **_separable_names("branch.sep11", "branches.separable_11"),
    **_separable_names("branch.sep7a", "branches.separable_7"),
    **_separable_names("branch.sep7b", "branches.separable_out"),
    **norm_names("wide_self_attn.ln", "wide_attention_norm"),
    **attention_names("wide_self_attn", "wide_self_attention"),
    **attention_names("cross_attn_1", "wide_cross_attention"),
    **norm_names("self_attn.ln", "self_attention_norm"),
    **attention_names("self_attn", "self_attention"),
    **norm_names("cross_attn_2.ln", "cross_attention_norm"),
    **attention_names("cross_attn_2", "cross_attention"),
    **norm_names("ffn.ln", "feed_forward_norm"),
    **norm_names("ffn.ln_1", "feed_forward.norm"),
    "ffn.w1": ("feed_forward.up_proj.weight", transposed),
    "ffn.b1": ("feed_forward.up_proj.bias", same),
    "ffn.w2": ("feed_forward.down_proj.weight", transposed),
    "ffn.b2": ("feed_forward.down_proj.bias", same),
}
STACK_NAMES = norm_names("final_ln", "final_norm")


def find(name: str) -> Renaming | None:
    """Our name of a weight in a stack, and how its shape changes; None for one that no stack has."""
    if name in STACK_NAMES:
        return STACK_NAMES[name]
    block = re.fullmatch(r"layer(\d+)\.(.+)", name)
    if block is None or block[2] not in BLOCK_NAMES:
        return None
    new, change = BLOCK_NAMES[block[2]]
    return f"layers.{block[1]}.{new}", change
