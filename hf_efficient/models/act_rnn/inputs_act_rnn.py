"""Inputs of a segment: what is refused, and pads moved behind the tokens.

Letters in shape notes: B batch, T tokens of the segment, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor, nn


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


def segment_mask(attention_mask: Tensor | None, shape: torch.Size, seen: int) -> Tensor | None:
    """The mask's last T columns, (B, T) bool, True for tokens; None when there are no pads.

    attention_mask: (B, T), or (B, seen + T) for all tokens so far. shape: (B, T).

    Raises:
        ValueError: it has another shape.
    """
    if attention_mask is None:
        return None
    batch_size, length = shape
    if tuple(attention_mask.shape) not in ((batch_size, length), (batch_size, seen + length)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be ({batch_size}, {length}) for "
            f"the segment or ({batch_size}, {seen + length}) for all tokens so far."
        )
    mask = attention_mask[:, -length:] != 0
    return None if can_look_at(mask) and mask.all() else mask


__all__ = ["can_look_at", "check_ids", "check_labels", "inverse", "is_replica", "pads_last", "reorder", "segment_mask"]
