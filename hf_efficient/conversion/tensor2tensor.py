"""Universal and Evolved Transformers of tensor2tensor 1.15 -> our models.

tensor2tensor keeps TensorFlow checkpoints, which name a variable after the call that made it. What is read here is the
settings as a dict and the weights by short names, such as `encoder/block0.self_attn.q.w`: the form of the files under
`tests/fixtures/ut_et`, whose README lists the names. Whoever has a checkpoint renames its variables to these.

Each value is known or refused: nothing is left out in silence. What differs between the two families stands in a file
for each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import tensor2tensor_evolved as evolved
from . import tensor2tensor_universal as universal
from .tensor2tensor_names import TARGET_SPACE_ID, Renaming, choose


@dataclass(frozen=True)
class Family:
    """What the kinds of models of one family share.

    Attributes:
        read_settings: From the settings to the class of the model that computes the same, and its configuration.
        find: From a weight's name in a stack to ours there, None if there is none, and how its shape changes.
        bare_kinds: Those without embeddings, which begin with embedded inputs.
        decoder_kind: The one of those whose model may have an encoder that the weights do not have.
    """

    read_settings: Callable[[Mapping[str, Any]], tuple[type[PreTrainedModel], PreTrainedConfig]]
    find: Callable[[str], Renaming | None]
    bare_kinds: tuple[str, ...]
    decoder_kind: str


UNIVERSAL = Family(universal.read_settings, universal.find, (universal.ENCODER, universal.DECODER), universal.DECODER)
EVOLVED = Family(evolved.read_settings, evolved.find, (evolved.ENCODER, evolved.DECODER), evolved.DECODER)
FAMILIES = dict.fromkeys(universal.KINDS, UNIVERSAL) | dict.fromkeys(evolved.KINDS, EVOLVED)


def convert_tensor2tensor(
    cfg: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model in evaluation mode.

    A bare encoder or decoder has no embedding, and a decoder with cross-attention no encoder: there the model's own
    stay as they were initialised, and are to be passed by (`inputs_embeds`, `encoder_outputs`).

    Args:
        cfg: The settings.
        weights: By their names, `<scope>/<name>`, or the name alone where both stacks share it.

    Raises:
        ValueError: a setting or a weight is unknown, missing, or has no counterpart.
    """
    model_class, config = read_settings(cfg)
    model = model_class(config).to(dtype)
    state_dict = rename_weights(cfg, weights)
    try:
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # of other sizes than the settings say
        raise ValueError(f"the weights contradict the settings: {error}") from None
    is_decoder = cfg["kind"] == _family(cfg).decoder_kind
    given_from_outside = ("embed_tokens.", "encoder.") if is_decoder else ("embed_tokens.",)
    missing = [name for name in missing if not name.startswith(given_from_outside) and name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"the weights contradict the settings: {missing} are missing, {unexpected} are too many.")
    model.tie_weights()
    return model.eval()


def _family(cfg: Mapping[str, Any]) -> Family:
    return choose(cfg, "kind", FAMILIES)


def read_settings(cfg: Mapping[str, Any]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and configuration of the model that computes the same.

    Raises:
        ValueError: a setting is unknown, missing, or has no counterpart.
    """
    return _family(cfg).read_settings(cfg)


def rename_weights(cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the model's weights; also of their gradients, which change their shapes alike.

    Raises:
        ValueError: a weight is unknown.
    """
    family = _family(cfg)
    prefix = "" if cfg["kind"] in family.bare_kinds else "model."
    state_dict = {}
    for name, weight in weights.items():
        stack, _, rest = name.partition("/")
        if name == "embed":
            state_dict[f"{prefix}embed_tokens.weight"] = weight
        elif name == "target_space_embed":
            state_dict[f"{prefix}encoder.input_bias.bias"] = weight[TARGET_SPACE_ID]
        else:
            renaming = family.find(rest) if stack in ("encoder", "decoder") else None
            if renaming is None:
                raise ValueError(f"the weight {name!r} has no counterpart.")
            new_name, change = renaming
            state_dict[f"{prefix}{stack}.{new_name}"] = change(weight).contiguous()
    return state_dict
