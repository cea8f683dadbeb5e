"""Small Evolved Transformers for the tests, one per way the model can be built; tools and tolerances come along."""

import torch
from models.model_tools import EXACT, HALF, QUIET, SINGLE, VOCAB_SIZE, fill, random_ids, word_tokenizer

from hf_efficient import (
    EvolvedTransformerConfig,
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
)

# How a decoder can be put together.
STRUCTURES = {
    "two_blocks": {},
    "one_block": {"num_decoder_layers": 1},
    "as_many_wide_heads": {"num_wide_attention_heads": 2, "position_signal": "none"},
    "one_wide_head": {"num_wide_attention_heads": 1, "scale_embeddings": False, "tie_word_embeddings": False},
    "zero_pad": {"zero_pad_embedding": True, "layer_norm_eps": 1e-3},
}


def small_config(**changes: object) -> EvolvedTransformerConfig:
    """A causal config of two blocks; dropout is off."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "is_decoder": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "eos_token_id": None,
    }
    return EvolvedTransformerConfig(**(settings | changes))


def small_model(
    cls: type = EvolvedTransformerForCausalLM, dtype: torch.dtype = torch.float64, seed: int = 3, **changes: object
) -> torch.nn.Module:
    """A model in evaluation mode whose parameters are all different from what initialisation gives."""
    return fill(cls(small_config(**changes)).to(dtype), seed).eval()


def pair_model(**changes: object) -> torch.nn.Module:
    """One with an encoder."""
    return small_model(EvolvedTransformerForConditionalGeneration, **({"is_decoder": False} | changes))


__all__ = [
    "EXACT",
    "HALF",
    "QUIET",
    "SINGLE",
    "STRUCTURES",
    "VOCAB_SIZE",
    "fill",
    "pair_model",
    "random_ids",
    "small_config",
    "small_model",
    "word_tokenizer",
]
