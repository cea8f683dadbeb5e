"""Evolved Transformer for transformers' own model tests, with one line for every test that is left out.

The harness that runs them outside of transformers' repository takes a file with `ENTRIES`, tuples of
(model class, configuration, kind, options).
"""

from hf_efficient import (
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerForSequenceClassification,
    EvolvedTransformerModel,
)

# One decoder block has two self-attentions, which count as two layers.
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# As many heads in the wide attention as in the others, as transformers' test of attention weights expects.
EQUAL_HEADS = {"num_wide_attention_heads": 2}
ENCODER = {"is_encoder_decoder": False}
DECODER = {"is_decoder": True}
TWO_STACKS = {"is_encoder_decoder": True}

HEADS = "expects as many heads in a block's first self-attention as in all others; runs where they are equal"
WIDE = {"skip": {"test_attention_outputs": HEADS}}
# The embeddings and one entry per block.
BLOCKS = {"tester": {"expected_num_hidden_layers": 2}}


def entry(model_class, config, kind, name, **options):
    """An entry whose body is `EvolvedTransformerModel`."""
    return model_class, TINY | config, kind, {"base_class": EvolvedTransformerModel, "name": name} | options


ENTRIES = [
    entry(EvolvedTransformerModel, DECODER, "base", "DecoderModel", **WIDE, **BLOCKS),
    entry(EvolvedTransformerModel, ENCODER, "base", "EncoderModel"),
    entry(EvolvedTransformerForCausalLM, DECODER, "causal-lm", "ForCausalLM", **WIDE, **BLOCKS),
    entry(EvolvedTransformerForCausalLM, DECODER | EQUAL_HEADS, "causal-lm", "EqualHeadsForCausalLM", **BLOCKS),
    entry(EvolvedTransformerForSequenceClassification, ENCODER, "seq-cls", "EncoderForSequences"),
    entry(
        EvolvedTransformerForSequenceClassification,
        DECODER | EQUAL_HEADS,
        "seq-cls",
        "DecoderForSequences",
        **BLOCKS,
    ),
    entry(
        EvolvedTransformerForConditionalGeneration,
        TWO_STACKS | {"num_encoder_layers": 1},
        "seq2seq-lm",
        "ForConditionalGeneration",
        **WIDE,
        **BLOCKS,
    ),
    entry(
        EvolvedTransformerForConditionalGeneration,
        TWO_STACKS | EQUAL_HEADS,
        "seq2seq-lm",
        "EqualHeadsForConditionalGeneration",
        skip={"test_hidden_states_output": "expects a state per attention; a decoder's block has two attentions"},
    ),
]
