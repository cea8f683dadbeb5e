"""Inputs of an Evolved Transformer call: what is refused, and what is assumed where nothing is given.

Letters in shape notes: B batch, L tokens of the call, S tokens so far, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_evolved_transformer import EvolvedTransformerConfig

logger = logging.get_logger(__name__)


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


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, config: EvolvedTransformerConfig) -> None:
    """Refuse both or neither, and what cannot be embedded."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    if inputs_embeds is not None:
        is_float = inputs_embeds.is_floating_point()
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.hidden_size or not is_float:
            raise ValueError(
                f"inputs_embeds is {inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}, but must hold "
                f"floating-point numbers in shape (batch, length, {config.hidden_size})."
            )
        return
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}, but must hold whole numbers (int64 or "
            "int32) in shape (batch, length)."
        )
    # On an accelerator the lookup itself stops at such an id.
    check_ids("input_ids", input_ids, config.vocab_size)


# Copied from hf_efficient/models/universal_transformer/inputs_universal_transformer.py::check_mask
def check_mask(attention_mask: Tensor | None, embeds: Tensor, num_seen: int) -> Tensor | None:
    """The mask of all tokens so far, (B, S) bool, True for tokens; None when there are no pads.

    Raises:
        ValueError: another shape than (B, num_seen + L), or a mask to be added to scores.
    """
    if attention_mask is None:
        return None
    expected = (embeds.shape[0], num_seen + embeds.shape[1])
    if not torch.compiler.is_compiling() and tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be {expected}: one column for each "
            "token so far."
        )
    if attention_mask.is_floating_point() and can_look_at(attention_mask):
        strange = attention_mask[~((attention_mask >= 0) & attention_mask.isfinite())]
        if strange.numel():
            raise ValueError(f"attention_mask holds {strange[0].item()}; give 1 for tokens and 0 for pads.")
    mask = (attention_mask != 0).to(embeds.device)
    if can_look_at(mask) and mask.all():
        return None
    return mask


# Copied from hf_efficient/models/universal_transformer/inputs_universal_transformer.py::check_whole_mask
def check_whole_mask(attention_mask: Tensor, num_queries: int, num_keys: int) -> None:
    """Refuse a mask of four dimensions that is not (B or 1, H or 1, num_queries or 1, num_keys), bool or added."""
    is_known = attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    fits = attention_mask.shape[2] in (1, num_queries) and attention_mask.shape[3] == num_keys
    if not is_known or not (fits or torch.compiler.is_compiling()):
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}, but one of four "
            f"dimensions must be (batch, 1, {num_queries}, {num_keys}): bool, True where a token looks, or numbers to "
            "be added to the scores."
        )


def check_encoder_states(
    states: Tensor | None, attention_mask: Tensor | None, batch_size: int, config: EvolvedTransformerConfig
) -> None:
    """Refuse what the decoder cannot attend to."""
    if states is None or states.ndim != 3 or states.shape[0] != batch_size or states.shape[2] != config.hidden_size:
        given = "missing" if states is None else f"of shape {tuple(states.shape)}"
        raise ValueError(
            f"The encoder's states are {given}, but must be ({batch_size}, length, {config.hidden_size}), with as "
            "many rows as the decoder's input; give input_ids or encoder_outputs that fit."
        )
    is_mask = attention_mask is None or attention_mask.ndim == 4
    if not is_mask and tuple(attention_mask.shape) != tuple(states.shape[:2]):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the encoder's states {tuple(states.shape)}; "
            "give one column for each of their positions."
        )


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


def default_positions(mask: Tensor | None, embeds: Tensor, num_seen: int) -> Tensor:
    """Index of each token among those of its row, (B or 1, L).

    Args:
        mask: (B, S) bool of all tokens so far, False for pads; None for no pads.
    """
    length = embeds.shape[1]
    if mask is None:
        return torch.arange(length, device=embeds.device)[None] + num_seen
    positions = mask.cumsum(dim=1) - 1
    return positions.clamp(min=0)[:, -length:]


def check_positions(position_ids: Tensor, embeds: Tensor) -> None:
    """Refuse positions of another shape than (B or 1, L)."""
    batch_size, length = embeds.shape[:2]
    if tuple(position_ids.shape) not in ((batch_size, length), (1, length)) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {tuple(position_ids.shape)}, but must hold whole numbers "
            f"in shape ({batch_size}, {length}) or (1, {length})."
        )
    if can_look_at(position_ids) and position_ids.numel() and int(position_ids.min()) < 0:
        raise ValueError(f"position_ids begins at {int(position_ids.min())}; give numbers from 0.")


def check_packed_texts(position_ids: Tensor, tokens: Tensor | None) -> None:
    """Refuse several texts in a row, which positions (B or 1, L) that start again mean: convolutions would mix them.

    Args:
        tokens: (B, L) bool, False for pads, whose positions do not count; None for no pads.
    """
    if not can_look_at(position_ids) or position_ids.shape[1] < 2:
        return
    if tokens is None:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    else:
        highest = position_ids.masked_fill(~tokens, -1).cummax(dim=1).values
        restarts = tokens[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])
    if restarts.any():
        raise ValueError(
            "position_ids start again within a row, but the convolutions look across the border of two texts; give "
            "each text a row of its own."
        )


def wanted_reports(config: EvolvedTransformerConfig, requests: dict[str, Any]) -> frozenset[str]:
    """Which of "hidden_states" and "attentions" (with "cross_attentions") a call asks for, by `output_...` or the
    configuration."""
    wanted = set()
    for name in ("hidden_states", "attentions"):
        answer = requests.get(f"output_{name}")
        if getattr(config, f"output_{name}") if answer is None else answer:
            wanted.add(name)
    if "attentions" in wanted:
        wanted.add("cross_attentions")
        if config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions=True gives None with attn_implementation={config._attn_implementation!r}, which "
                "makes no attention weights; call model.set_attn_implementation('eager') first."
            )
    return frozenset(wanted)


__all__ = [
    "can_look_at",
    "check_encoder_states",
    "check_ids",
    "check_labels",
    "check_mask",
    "check_packed_texts",
    "check_positions",
    "check_tokens",
    "check_whole_mask",
    "default_positions",
    "is_replica",
    "wanted_reports",
]
