"""The check after a conversion: what was written is loaded again and compared with what was read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..models.transformer_xl import TransformerXLConfig

# Two segments, with a memory between them where there is one.
SEGMENTS, ROWS, LENGTH = 2, 2, 8


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        num_tensors: Tensors of the source, each equal to its counterpart bit for bit.
        max_output_difference: Largest difference of the outputs of the written and the converted model, on random
            ids, with memory where there is one; 0.0.
    """

    num_tensors: int
    max_output_difference: float


def verify_conversion(model: PreTrainedModel, state_dict: dict[str, Tensor], folder: Path) -> Verification:
    """Load the model in `folder` and compare it with what it was made from.

    Args:
        model: The converted model, as it was saved.
        state_dict: The source's weights under their names on disk, tied ones repeated or not.
        folder: Where the model was saved.

    Raises:
        ValueError: a tensor or an output differs, or the source lacks one of the written tensors.
    """
    written = _without_prefix(load_file(folder / "model.safetensors"))
    source = _without_prefix(state_dict)
    repeats = repeated_weights(model.config) if isinstance(model.config, TransformerXLConfig) else {}
    for name, tensor in source.items():
        counterpart = written.get(name, written.get(repeats.get(name, "")))
        if counterpart is None or not torch.equal(counterpart, tensor):
            raise ValueError(f"{name} of the source is not what was written to {folder}; report this.")
    missing = written.keys() - source.keys() - {repeats.get(name) for name in source}
    if missing:
        raise ValueError(f"The source lacks {', '.join(sorted(missing))}; give a complete checkpoint.")
    difference = _output_difference(model, type(model).from_pretrained(folder))
    if difference != 0.0:
        raise ValueError(f"The model written to {folder} gives other outputs, by {difference}; report this.")
    return Verification(len(state_dict), difference)


def check_ties(config: TransformerXLConfig, state_dict: dict[str, Tensor]) -> None:
    """Refuse weights, under their names on disk, that should be equal by the configuration and are not.

    Raises:
        ValueError: the two weights by name, and the settings that tie them.
    """
    weights = _without_prefix(state_dict)
    for name, origin in repeated_weights(config).items():
        if name in weights and origin in weights and not torch.equal(weights[name], weights[origin]):
            raise ValueError(
                f"{name} differs from {origin}, and the checkpoint's configuration says that they are one "
                "(tie_word_embeddings, tie_projs or untie_r); correct it in config.json."
            )


def repeated_weights(config: TransformerXLConfig) -> dict[str, str]:
    """For each name that a file may hold though it repeats another's tensor: the other. Without `transformer.`."""
    repeats = {}
    for index, is_tied in enumerate(config.tie_projs or ()):
        if config.tie_word_embeddings:
            repeats[f"crit.out_layers.{index}.weight"] = f"word_emb.emb_layers.{index}.weight"
        if is_tied:
            repeats[f"crit.out_projs.{index}"] = f"word_emb.emb_projs.{index if config.div_val > 1 else 0}"
    if not config.untie_r:
        for index in range(config.num_hidden_layers):
            repeats |= {f"layers.{index}.dec_attn.{bias}": bias for bias in ("r_w_bias", "r_r_bias")}
    return repeats


def _without_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The body's weights have the prefix `transformer.` only in models with a head. Position tables are left out."""
    short = {name.removeprefix("transformer."): tensor for name, tensor in state_dict.items()}
    return {name: tensor for name, tensor in short.items() if name != "pos_emb.inv_freq"}


@torch.no_grad()
def _output_difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest difference of the two models' outputs over some segments of random ids."""
    generator = torch.Generator().manual_seed(0)
    shape = (SEGMENTS, ROWS, LENGTH)
    segments = torch.randint(one.config.vocab_size, shape, generator=generator)
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for found, model in zip(outputs, (one.eval(), other.eval()), strict=True):
        memory = model.create_cache() if isinstance(model.config, TransformerXLConfig) else None
        found += [model(ids, torch.ones_like(ids), past_key_values=memory)[0] for ids in segments]
    return max((a - b).abs().max().item() for a, b in zip(*outputs, strict=True))
