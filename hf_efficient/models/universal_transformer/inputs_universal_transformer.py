"""Inputs of a Universal Transformer call: what is refused, and what is assumed where nothing is given.

Letters in shape notes: B batch, L tokens of the call, S tokens so far, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_universal_transformer import UniversalTransformerConfig

logger = logging.get_logger(__name__)

# Spread of the logarithm of a random number of steps (Geiping et al. 2025, section 3.3).
POISSON_LOGNORMAL_SPREAD = 0.5


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


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, config: UniversalTransformerConfig) -> None:
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
    states: Tensor | None, attention_mask: Tensor | None, batch_size: int, config: UniversalTransformerConfig
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


def default_positions(mask: Tensor | None, embeds: Tensor, num_seen: int, count_padding: bool) -> Tensor:
    """Index of each token among those of its row, (B or 1, L).

    Args:
        mask: (B, S) bool of all tokens so far, False for pads; None for no pads.
        count_padding: pads take positions too, except before the first token.
    """
    length = embeds.shape[1]
    if mask is None:
        return torch.arange(length, device=embeds.device)[None] + num_seen
    if count_padding:
        num_leading = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
        positions = torch.arange(mask.shape[1], device=mask.device) - num_leading
    else:
        positions = mask.cumsum(dim=1) - 1
    return positions.clamp(min=0)[:, -length:]


def check_positions(
    position_ids: Tensor, embeds: Tensor, config: UniversalTransformerConfig, is_training: bool
) -> None:
    """Refuse positions of another shape than (B or 1, L), or without a learned vector."""
    batch_size, length = embeds.shape[:2]
    if tuple(position_ids.shape) not in ((batch_size, length), (1, length)) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {tuple(position_ids.shape)}, but must hold whole numbers "
            f"in shape ({batch_size}, {length}) or (1, {length})."
        )
    if not can_look_at(position_ids) or not position_ids.numel():
        return
    lowest, highest = (int(bound) for bound in position_ids.aminmax())
    if lowest < 0:
        raise ValueError(f"position_ids begins at {lowest}; give numbers from 0.")
    if config.position_signal != "learned":
        return
    offset = config.max_position_offset if is_training else 0
    limit = config.max_position_embeddings - offset
    if highest >= limit:
        reason = f" - max_position_offset={offset} in training" if offset else ""
        raise ValueError(
            f"A sequence of {highest + 1} tokens is longer than the {limit} positions of this model "
            f"(max_position_embeddings={config.max_position_embeddings}{reason}); shorten it, or use "
            "position_signal='sinusoid', which has no limit."
        )


def check_packed_texts(position_ids: Tensor, config: UniversalTransformerConfig) -> None:
    """Refuse several texts in a row, which positions (B or 1, L) that start again mean, where they would mix."""
    if config.transition != "separable_convolution" or not can_look_at(position_ids):
        return
    if (position_ids[:, 1:] <= position_ids[:, :-1]).any():
        raise ValueError(
            "position_ids start again within a row, but transition='separable_convolution' looks across the border of "
            "two texts; give each text a row of its own, or use transition='feed_forward'."
        )


def choose_depth(
    config: UniversalTransformerConfig,
    is_training: bool,
    num_steps: int | None,
    exit_threshold: float | None,
    min_steps: int | None,
) -> tuple[int, float, int]:
    """Number of steps, halting threshold and least number of steps of a call.

    Raises:
        ValueError: they contradict the configuration or each other.
    """
    for name, value in (("exit_threshold", exit_threshold), ("min_steps", min_steps)):
        if value is not None and not config.is_halting:
            raise ValueError(
                f"{name}={value} was given, but with halting='none' every position takes all steps; leave it out, or "
                "give num_steps."
            )
    if num_steps is None:
        num_steps = random_depth(config) if is_training and config.random_depth else config.max_steps
    _check_count("num_steps", num_steps)
    if config.step_signal == "learned" and num_steps > config.max_steps:
        raise ValueError(
            f"num_steps={num_steps}, but the learned step signal has max_steps={config.max_steps} rows; give less, or "
            "train a model with step_signal='sinusoid' or 'none'."
        )
    if exit_threshold is not None and not (isinstance(exit_threshold, float) and 0 < exit_threshold < 1):
        raise ValueError(f"exit_threshold={exit_threshold!r} is outside (0, 1); give a probability such as 0.99.")
    if min_steps is not None:
        _check_count("min_steps", min_steps)
        if min_steps > num_steps:
            raise ValueError(f"min_steps={min_steps} is more than num_steps={num_steps}; correct one of them.")
    threshold = config.halting_threshold if exit_threshold is None else exit_threshold
    return num_steps, threshold, min(config.min_steps, num_steps) if min_steps is None else min_steps


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is no number of steps; give a whole number from 1.")


@torch.compiler.disable
def random_depth(config: UniversalTransformerConfig) -> int:
    """A number of steps for one training call, from torch's generator.

    `"poisson_lognormal"` is 1 + Poisson(e^x) with x normal, so that the mean is `mean_training_steps`; with learned
    step signals not more than there are.
    """
    if config.random_depth == "uniform":
        return int(torch.randint(1, config.max_steps + 1, ()))
    mean = config.mean_training_steps or config.max_steps
    if mean == 1:
        return 1
    spread = POISSON_LOGNORMAL_SPREAD
    rate = torch.exp(torch.randn(()) * spread + torch.tensor(float(mean - 1)).log() - spread**2 / 2)
    num_steps = 1 + int(torch.poisson(rate))
    return min(num_steps, config.max_steps) if config.step_signal == "learned" else num_steps


def wanted_reports(config: UniversalTransformerConfig, requests: dict[str, Any]) -> frozenset[str]:
    """Which of "hidden_states", "attentions" (with "cross_attentions") and "step_hidden_states" a call asks for, by
    `output_...` or the configuration."""
    names = ("hidden_states", "attentions", "step_hidden_states")
    answers = {name: requests.get(f"output_{name}") for name in names}
    for name in ("hidden_states", "attentions"):
        if answers[name] is None:
            answers[name] = getattr(config, f"output_{name}")
    if answers["attentions"]:
        if config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions=True gives None with attn_implementation={config._attn_implementation!r}, which "
                "makes no attention weights; call model.set_attn_implementation('eager') first."
            )
        answers["cross_attentions"] = True
    return frozenset(name for name, is_wanted in answers.items() if is_wanted)


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
    "choose_depth",
    "default_positions",
    "is_replica",
    "random_depth",
    "wanted_reports",
]
