"""Settings of a trax Reformer that its weights cannot tell, from the run's gin file or from a config.json."""

import json
from math import ceil, log2, prod, sqrt
from pathlib import Path
from typing import Any

from .gin_settings import GinSettings, Reference

MAX_UNFACTORISED_BUCKETS = 128

# What weights cannot tell and outputs depend on, by the layer types that need it.
NEEDED = {
    None: ("hidden_act",),
    "lsh": ("lsh_attn_chunk_length", "num_buckets", "num_hashes"),
    "local": ("local_attn_chunk_length",),
}
ACTIVATIONS = {
    "Relu": "relu",
    "Gelu": "gelu",
    "FastGelu": "gelu_new",
    "Swish": "silu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
}


def read_trax_settings(
    config: Path | dict[str, Any], sizes: dict[str, Any], is_shared: list[bool]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the configuration beside the sizes; what is worth knowing, as sentences.

    Args:
        config: A gin file, a config.json, or what one holds.
        sizes: What the weights tell.
        is_shared: For each layer whether queries and keys share a projection.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither; a setting is missing, contradicts the weights, or is of a variant that has no
            counterpart.
    """
    origin = config if isinstance(config, Path) else "config"
    if isinstance(config, Path) and not config.is_file():
        raise FileNotFoundError(f"there is no {config}; give the path of the run's config.gin or of a config.json.")
    if isinstance(config, Path) and config.suffix == ".gin":
        given, notes = _read_gin(GinSettings(config), sizes, is_shared)
    else:
        given, notes = _read_json(config, is_shared), []
    for name, value in sizes.items():
        if name in given and _as_list(given[name]) != value:
            raise ValueError(f"{origin} says {name}={given[name]!r}, and the weights have {value!r}.")
    _check_complete(origin, given, is_shared)
    return given, notes


def longest_text(sizes: dict[str, Any]) -> int:
    """Tokens that the position tables reach to."""
    return prod(sizes["axial_pos_shape"]) if sizes["axial_pos_embds"] else sizes["max_position_embeddings"]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_json(config: Path | dict[str, Any] | None, is_shared: list[bool]) -> dict[str, Any]:
    """What a config.json says; layer types that it leaves out follow from the weights."""
    if isinstance(config, Path):
        try:
            config = json.loads(config.read_text("utf-8"))
        except ValueError:
            config = None
    if not isinstance(config, dict):
        raise ValueError("config is neither a gin file nor a JSON object with settings.")
    given = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    given.setdefault("attn_layers", ["lsh" if shared else "local" for shared in is_shared])
    return given


def _read_gin(gin: GinSettings, sizes: dict[str, Any], is_shared: list[bool]) -> tuple[dict[str, Any], list[str]]:
    """Settings of a run, with trax's defaults where the file is silent; what is worth knowing, as sentences."""
    model = "ReformerLM"
    if not gin.has(model):
        raise ValueError(f"{gin.path} has no settings of {model}; give the config.gin of a {model} run.")
    for parameter in ("ff_use_sru", "ff_sparsity", "loss_sparsity"):
        if gin.get(model, parameter, 0):
            raise ValueError(f"{gin.path}: {model}.{parameter} is set, which has no counterpart in this model.")
    activation = gin.get(model, "ff_activation", Reference("FastGelu"))
    if not isinstance(activation, Reference) or activation.name not in ACTIVATIONS:
        raise ValueError(f"{gin.path}: ff_activation={activation!r} is none of {', '.join(ACTIVATIONS)}.")
    dropout = gin.get(model, "dropout", 0.1)
    length = longest_text(sizes)
    settings = {
        "attn_layers": _layer_types(gin, is_shared),
        "hidden_act": ACTIVATIONS[activation.name],
        "hidden_dropout_prob": dropout,
        "chunk_size_feed_forward": gin.get(model, "ff_chunk_size", 0),
        # A layer without chunks sees everything, as one with a single chunk.
        "local_attn_chunk_length": gin.get("SelfAttention", "chunk_len") or length,
        "local_num_chunks_before": gin.get("SelfAttention", "n_chunks_before", 0),
        "local_num_chunks_after": gin.get("SelfAttention", "n_chunks_after", 0),
        "local_attention_probs_dropout_prob": gin.get("SelfAttention", "attention_dropout", dropout),
        "lsh_attn_chunk_length": gin.get("LSHSelfAttention", "chunk_len", 128),
        "lsh_num_chunks_before": gin.get("LSHSelfAttention", "n_chunks_before", 1),
        "lsh_num_chunks_after": gin.get("LSHSelfAttention", "n_chunks_after", 0),
        "lsh_attention_probs_dropout_prob": gin.get("LSHSelfAttention", "attention_dropout", dropout),
        "num_hashes": gin.get("LSHSelfAttention", "n_hashes", 1),
        "num_buckets": gin.get("LSHSelfAttention", "n_buckets"),
    }
    notes = []
    if settings["num_buckets"] is None and "lsh" in settings["attn_layers"]:
        settings["num_buckets"] = _default_buckets(length, settings["lsh_attn_chunk_length"])
        notes.append(
            f"trax chose buckets by each text's length; num_buckets={settings['num_buckets']} is for {length}."
        )
    return settings, notes


def _layer_types(gin: GinSettings, is_shared: list[bool]) -> list[str]:
    """One type per layer; `attention_type` is repeated along the layers."""
    kinds = gin.get("ReformerLM", "attention_type", Reference("SelfAttention"))
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [kinds]
    names = [kind.name if isinstance(kind, Reference) else str(kind) for kind in kinds]
    unknown = sorted(set(names) - {"SelfAttention", "LSHSelfAttention"})
    if unknown or not names:
        raise ValueError(
            f"{gin.path}: attention_type {', '.join(unknown) or '[]'} has no counterpart; only SelfAttention and "
            "LSHSelfAttention do."
        )
    types = []
    for index, shared in enumerate(is_shared):
        name = names[index % len(names)]
        if name == "LSHSelfAttention":
            types.append("lsh")
        elif not gin.get("SelfAttention", "share_qk", False):
            types.append("local")
        elif gin.get("SelfAttention", "chunk_len") is None:
            types.append("full")
        else:
            raise ValueError(f"{gin.path}: SelfAttention with share_qk and chunk_len has no counterpart.")
        if shared != (types[-1] != "local"):
            raise ValueError(f"{gin.path} makes layer {index} a {name}, and its weights are not of that kind.")
    return types


def _default_buckets(length: int, chunk_length: int) -> int | list[int]:
    """trax's number of buckets for texts of one length: two per chunk, in two factors from 130 on."""
    num_buckets = 2 * max(1, length // chunk_length)
    if num_buckets <= MAX_UNFACTORISED_BUCKETS:
        return num_buckets
    first = 2 ** ceil(log2(sqrt(num_buckets)))
    return [first, 2 * (num_buckets // (2 * first))]


def _check_complete(origin: Path | str, given: dict[str, Any], is_shared: list[bool]) -> None:
    """Raises ValueError where a setting is missing that the weights cannot tell, or layer types do not fit them."""
    types = given["attn_layers"]
    fits = len(types) == len(is_shared) and all(
        (kind == "local") != shared for kind, shared in zip(types, is_shared, strict=True)
    )
    if not fits:
        kinds = ["shared" if shared else "separate" for shared in is_shared]
        raise ValueError(
            f"{origin} says attn_layers={types!r}, and the queries and keys of the weights' layers are {kinds}; only "
            "'local' has separate ones."
        )
    needed = [name for kind, names in NEEDED.items() if kind is None or kind in types for name in names]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(missing)}, which cannot be told from the weights; add them.")
