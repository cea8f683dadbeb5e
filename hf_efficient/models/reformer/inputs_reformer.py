"""Inputs of a Reformer call: what is refused, and pads moved behind the tokens.

Letters in shape notes: B batch, H heads, R hash rounds, T tokens of the call, S keys, D hidden_size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_reformer import SHARED_QUERY_KEY_LAYERS, ReformerConfig, check_layer_types


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::can_look_at
def can_look_at(tensor: Tensor) -> bool:
    """Whether a branch on the tensor's content is free: it would stop an accelerator, and break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::check_ids
def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary with the argument's name."""
    if not can_look_at(ids) or ids.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{name} holds ids from {lowest} to {highest}, but vocab_size={vocab_size} allows 0 to {vocab_size - 1}; "
            "use the model's tokenizer, or resize_token_embeddings."
        )


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::pads_last
def pads_last(mask: Tensor) -> tuple[Tensor, Tensor]:
    """From a mask (B, T): the order (B, T) that puts tokens first and pads last, and the number of pads (B,)."""
    is_pad = ~mask
    num_pads = is_pad.sum(dim=1)
    # Where each one goes; a stable sort by hand, because ONNX has none.
    first_pad = mask.shape[1] - num_pads[:, None]
    place = torch.where(mask, mask.cumsum(dim=1), first_pad + is_pad.cumsum(dim=1)) - 1
    return inverse(place), num_pads


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::inverse
def inverse(order: Tensor) -> Tensor:
    """(B, T) that undoes an order (B, T)."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::reorder
def reorder(states: Tensor, order: Tensor) -> Tensor:
    """(B, T, D) with each row's tokens in the order (B, T)."""
    return states.gather(1, order[..., None].expand_as(states))


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::reorder_attention
def reorder_attention(weights: Tensor, order: Tensor) -> Tensor:
    """(B, H, T, S) with the queries, and the keys behind the memory, in the order (B, T)."""
    length = weights.shape[2]
    queries = order[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
    weights = weights.gather(2, queries)
    keys = order[:, None, None].expand(-1, weights.shape[1], length, -1)
    return torch.cat([weights[..., :-length], weights[..., -length:].gather(3, keys)], dim=3)


def reorder_buckets(buckets: Tensor, order: Tensor) -> Tensor:
    """(B, H, R, T) with each row's tokens in the order (B, T)."""
    return buckets.gather(3, order[:, None, None].expand_as(buckets))


# Copied from hf_efficient/models/transformer_xl/inputs_transformer_xl.py::check_labels
def check_labels(name: str, labels: Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Refuse labels of another shape than the segment's, or outside the vocabulary."""
    if labels.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}, but the segment has {tuple(shape)}; give one label per token, "
            "-100 where there is none."
        )
    if can_look_at(labels):
        check_ids(name, labels[labels != -100], vocab_size)


def cut(states: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` along `dim`; the tensor itself, part of the graph to the loss, if that is all."""
    if not isinstance(length, int):
        # A symbol of an exported program, which would record how a slice lies in memory, and with it whether the last
        # chunk was full.
        return states.index_select(dim, torch.arange(length, device=states.device))
    return states if states.shape[dim] == length else states.narrow(dim, 0, length)


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, config: ReformerConfig) -> Tensor:
    """The one of the two that was given, if its shape and content can be embedded; else ValueError."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    if inputs_embeds is not None:
        is_float = inputs_embeds.is_floating_point()
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.hidden_size or not is_float:
            raise ValueError(
                f"inputs_embeds is {inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}, but must hold "
                f"floating-point numbers in shape (batch, length, {config.hidden_size})."
            )
        return inputs_embeds
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}, but must hold whole numbers (int64 or "
            "int32) in shape (batch, length)."
        )
    # On an accelerator the lookup itself stops at such an id.
    check_ids("input_ids", input_ids, config.vocab_size)
    return input_ids


def check_mask(attention_mask: Tensor | None, tokens: Tensor, num_seen: int) -> Tensor | None:
    """The mask's last T columns, (B, T) bool, True for tokens; None when there are no pads.

    Raises:
        ValueError: another shape than (B, T) or (B, num_seen + T), or a mask to be added to scores.
    """
    if attention_mask is None:
        return None
    batch_size, length = tokens.shape[:2]
    if tuple(attention_mask.shape) not in ((batch_size, length), (batch_size, num_seen + length)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be ({batch_size}, {length}) for the "
            f"tokens given or ({batch_size}, {num_seen + length}) for all tokens so far."
        )
    if attention_mask.is_floating_point() and can_look_at(attention_mask):
        strange = attention_mask[~((attention_mask >= 0) & attention_mask.isfinite())]
        if strange.numel():
            raise ValueError(f"attention_mask holds {strange[0].item()}; give 1 for tokens and 0 for pads.")
    mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
    if can_look_at(mask) and mask.all():
        return None
    return mask.to(tokens.device)


def check_past_mask(attention_mask: Tensor | None, length: int, num_seen: int, row_lengths: Tensor | None) -> None:
    """Refuse a mask (B, num_seen + length) whose earlier columns contradict what the cache took in.

    Args:
        row_lengths: (B,) tokens of each row in the cache; None when no row has had a pad.
    """
    if attention_mask is None or torch.compiler.is_compiling() or num_seen == 0 or attention_mask.shape[1] == length:
        return
    tokens = (attention_mask[:, :num_seen] != 0).sum(dim=1)
    differs = (tokens != (num_seen if row_lengths is None else row_lengths.to(tokens.device))).nonzero()
    if differs.numel():
        row = int(differs[0])
        raise ValueError(
            f"attention_mask says that row {row} had {int(tokens[row])} tokens before these, but its cache took in "
            "another number; mask a pad when it is fed, or pass the mask of the new tokens alone (generate masks no "
            "pads behind rows that have ended: choose the others with batch_select_indices)."
        )


def count_last_tokens(mask: Tensor) -> int:
    """Columns at the end of a mask (B, T) in which every row has a token."""
    return int(mask.all(dim=0).flip(0).long().cumprod(0).sum())


# Copied from hf_efficient/models/universal_transformer/inputs_universal_transformer.py::is_replica
def is_replica(module: nn.Module, past_key_values: Any, use_cache: bool | None) -> bool:
    """Whether `module` is a copy by `nn.DataParallel`, whose calls keep no cache: the copies' could not be joined.

    Raises:
        ValueError: a cache was given to a copy, or asked of it.
    """
    if not getattr(module, "_is_replica", False):
        return False
    if past_key_values is not None or use_cache:
        given = "use_cache=True" if past_key_values is None else "past_key_values"
        raise ValueError(
            f"{given} was given under nn.DataParallel, which cannot split a cache among GPUs; leave it out, or start "
            "one process for each GPU: torchrun --nproc_per_node <GPUs>."
        )
    return True


def check_positions(position_ids: Tensor | None, tokens: Tensor, config: ReformerConfig) -> None:
    """Refuse positions of another shape than (B or 1, T), or without an embedding."""
    if position_ids is None:
        return
    batch_size, length = tokens.shape[:2]
    if tuple(position_ids.shape) not in ((batch_size, length), (1, length)) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {tuple(position_ids.shape)}, but must hold whole numbers "
            f"in shape ({batch_size}, {length}) or (1, {length})."
        )
    if can_look_at(position_ids) and position_ids.numel():
        lowest, highest = (int(bound) for bound in position_ids.aminmax())
        if lowest < 0:
            raise ValueError(f"position_ids begins at {lowest}; give numbers from 0.")
        check_length(highest + 1, config)


def check_length(length: int, config: ReformerConfig) -> None:
    """Refuse sequences longer than there are positions."""
    if length <= config.num_positions:
        return
    bounds = f"max_position_embeddings={config.max_position_embeddings}"
    if config.axial_pos_embds:
        bounds += f" and axial_pos_shape={config.axial_pos_shape}"
    raise ValueError(
        f"A sequence of {length} tokens is longer than the {config.num_positions} positions of this model ({bounds}); "
        "shorten it, or train a model with more positions."
    )


def check_overrides(
    num_hashes: int | None, attn_layers: list[str] | None, own_layers: list[str], config: ReformerConfig
) -> tuple[int, list[str]]:
    """Hash rounds and layer types of this call.

    Raises:
        ValueError: not a positive number; unknown types, another number of layers, or a change between types whose
            weights differ.
    """
    if num_hashes is not None and (not isinstance(num_hashes, int) or num_hashes < 1):
        raise ValueError(f"num_hashes={num_hashes!r} is no positive number of rounds; give a whole number from 1.")
    num_hashes = config.num_hashes if num_hashes is None else num_hashes
    if attn_layers is None:
        return num_hashes, own_layers
    check_layer_types("attn_layers", attn_layers)
    if len(attn_layers) != len(own_layers):
        raise ValueError(
            f"attn_layers={list(attn_layers)} names {len(attn_layers)} layers, but the model has {len(own_layers)}; "
            "give one entry per layer."
        )
    for index, (given, own) in enumerate(zip(attn_layers, own_layers, strict=True)):
        if given != own and not {given, own} <= {*SHARED_QUERY_KEY_LAYERS}:
            raise ValueError(
                f"attn_layers={list(attn_layers)} makes layer {index} {given!r}, but its weights are those of "
                f"{own!r}; only {', '.join(SHARED_QUERY_KEY_LAYERS)} can stand in for each other."
            )
        if given in ("lsh", "windowed_lsh") and config.lsh_attn_chunk_length is None:
            raise ValueError(
                f"attn_layers={list(attn_layers)} hashes, but lsh_attn_chunk_length=None; set the lsh_... fields."
            )
    return num_hashes, list(attn_layers)


def chunk_padding(length: int, layer_types: list[str], is_causal: bool, config: ReformerConfig) -> int:
    """Pads to add after `length` tokens, as transformers' Reformer does, where it changes what tokens see.

    `lsh` chunks hold pads among tokens, and the last chunks that a bidirectional `local` layer's first ones look
    back to may consist of them. All other layers give tokens the same with and without them.
    """
    chunks = {"lsh": config.lsh_attn_chunk_length, "local": config.local_attn_chunk_length}
    chunks = [chunks[kind] for kind in ("lsh", "local") if kind in layer_types]
    is_needed = "lsh" in layer_types or ("local" in layer_types and not is_causal)
    if not is_needed or length <= min(chunks):
        return 0
    return -length % math.lcm(*chunks)


__all__ = [
    "can_look_at",
    "check_ids",
    "check_labels",
    "check_length",
    "check_mask",
    "check_overrides",
    "check_past_mask",
    "check_positions",
    "check_tokens",
    "chunk_padding",
    "count_last_tokens",
    "cut",
    "inverse",
    "is_replica",
    "pads_last",
    "reorder",
    "reorder_attention",
    "reorder_buckets",
]
