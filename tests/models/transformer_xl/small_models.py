"""Small Transformer-XL models for the tests, one per way the model can be built, and the tolerances."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_efficient import TransformerXLConfig, TransformerXLForCausalLM

# Float64 has 16 digits; two programs that add the same few hundred numbers in another order differ by 1e-13 here.
# 1e-9 leaves room for the tests' large weights and is far below what any error in a formula makes.
EXACT = {"rtol": 1e-9, "atol": 1e-10}
# Float32 has 7 digits; states here reach 10, and a few layers of sums in another order cost two digits.
SINGLE = {"rtol": 1e-4, "atol": 1e-4}
# bfloat16 and float16 have 3 digits; states of size 1 pass about ten roundings.
HALF = {"rtol": 5e-2, "atol": 5e-2}

VOCAB_SIZE = 17
# How the model can be built. Segments in the tests are up to 7 tokens long, so that mem_len is met both ways round.
VARIANTS = {
    "plain": {},
    "pre_norm": {"pre_norm": True},
    "shared_biases": {"untie_r": False},
    "clamped": {"clamp_len": 3},
    "short_memory": {"mem_len": 2},
    "no_memory": {"mem_len": 0},
    "same_length": {"same_length": True, "mem_len": 4},
    "same_length_one": {"same_length": True, "mem_len": 1},
    "zeros": {"memory_init": "zeros", "mem_len": 4},
    "zeros_same_length": {"memory_init": "zeros", "same_length": True, "mem_len": 5, "clamp_len": 2},
    "zeros_pre_norm": {"memory_init": "zeros", "pre_norm": True, "mem_len": 3},
    "narrow_heads": {"head_dim": 3, "num_attention_heads": 3},
    "narrow_embedding": {"embedding_size": 4},
    "untied_words": {"tie_word_embeddings": False},
    "adaptive": {"cutoffs": [5, 11]},
    "adaptive_narrow": {"cutoffs": [5, 11], "embedding_size": 4, "tie_projs": [True, False, True]},
    "adaptive_shrinking": {"cutoffs": [5, 11], "div_val": 2},
    "adaptive_untied": {
        "cutoffs": [3, 4, 12],
        "div_val": 2,
        "tie_projs": [False] * 4,
        "tie_word_embeddings": False,
    },
    "everything": {
        "pre_norm": True,
        "untie_r": False,
        "clamp_len": 4,
        "same_length": True,
        "mem_len": 5,
        "memory_init": "zeros",
        "cutoffs": [4, 9],
        "div_val": 2,
        "tie_projs": [True, True, False],
        "head_dim": 6,
    },
}


# The memory holds keys and values where no gradient is asked for, and hidden states where one is.
MODES = {"keys_and_values": torch.no_grad, "hidden_states": torch.enable_grad}


def small_config(**changes: object) -> TransformerXLConfig:
    """A config of two layers; dropout is off."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "mem_len": 9,
        "dropout": 0.0,
    }
    return TransformerXLConfig(**(settings | changes))


def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter, norms and biases too, distinct values large enough that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("layer_norm.weight"):
                values = 1 + 0.3 * values
            elif name.endswith(".bias"):
                values = 0.2 * values
            else:
                values = 0.7 * values
            parameter.copy_(values)
    return model


def small_model(
    cls: type = TransformerXLForCausalLM, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object
) -> torch.nn.Module:
    """A model in evaluation mode whose parameters are all different from what initialisation gives."""
    return fill(cls(small_config(**changes)).to(dtype), seed).eval()


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    """Ids that do not depend on what was drawn before."""
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of as many words, w0 to w16, as the small models have ids."""
    vocab = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w16"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")


def log_probs(output: object) -> Tensor:
    """(B, T, V) log-probabilities, whichever softmax the model has."""
    return output.logits.log_softmax(-1)


def assert_rows_equal(output: object, segments: list, mask: Tensor | None = None) -> None:
    """The model's log-probabilities at the tokens (not the pads) are those of each row alone."""
    for row, (columns, segment) in enumerate(zip(log_probs(output), segments, strict=True)):
        given = columns if mask is None else columns[mask[row].bool()]
        expected = given[:0] if segment is None else segment.log_probs
        torch.testing.assert_close(given, expected, **EXACT, msg=lambda text, row=row: f"row {row}: {text}")
