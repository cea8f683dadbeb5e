"""The models of the contract: every public class of every architecture, small, in each way it can be built."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import transformers

import hf_efficient

# Kinds of models, by the end of the class's name, and the Auto class that loads each.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ModelWithLMHead": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "EncoderModel": "AutoModelForTextEncoding",
    "Model": "AutoModel",
}
ENCODERS = (
    "EncoderModel",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
DECODER, ENCODER = {"is_decoder": True}, {"is_decoder": False}
PAIR = {"is_decoder": False, "is_encoder_decoder": True}


@dataclass(frozen=True)
class Variant:
    """A way to build an architecture: what the documentation calls it, its folder, and settings of its small model."""

    title: str
    architecture: str
    prefix: str
    settings: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    # Whether one class serves encoders, decoders and pairs, so that a head needs its own choice of stacks.
    has_stacks: bool = False


HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
ALL_HEADS = (*HEADS, "ForMaskedLM", "ForQuestionAnswering", "ForConditionalGeneration")
# Buckets drawn from a seed of their own, so that two calls hash alike.
HASHED = {"attn_layers": ["local", "lsh"], "hash_seed": 3}
HALTING = {"halting": "act", "num_layers_in_group": 2}
# Assisted decoding asks for a memory that reaches back to the first token.
LONG_MEMORY = {"mem_len": 64}
VARIANTS = {
    "xl": Variant("Transformer-XL", "transformer_xl", "TransformerXL", LONG_MEMORY, HEADS),
    "xl_adaptive": Variant(
        "Transformer-XL, adaptive softmax",
        "transformer_xl",
        "TransformerXL",
        LONG_MEMORY | {"cutoffs": [5, 11], "div_val": 2},
        ("Model", "ForCausalLM"),
    ),
    "reformer": Variant(
        "Reformer",
        "reformer",
        "Reformer",
        HASHED | {"attn_layers": ["full", "windowed_lsh", "local"]},
        (*ALL_HEADS, "ModelWithLMHead"),
        has_stacks=True,
    ),
    "reformer_lsh": Variant("Reformer, `lsh` layers", "reformer", "Reformer", HASHED, ALL_HEADS, has_stacks=True),
    "reformer_plain": Variant(
        "Reformer, not reversible",
        "reformer",
        "Reformer",
        HASHED | {"attn_layers": ["full", "windowed_lsh"], "reversible": False},
        ("Model", "ForCausalLM"),
        has_stacks=True,
    ),
    "ut": Variant(
        "Universal Transformer",
        "universal_transformer",
        "UniversalTransformer",
        {"max_steps": 3},
        (*ALL_HEADS, "EncoderModel"),
        has_stacks=True,
    ),
    "ut_halting": Variant(
        "Universal Transformer, halting",
        "universal_transformer",
        "UniversalTransformer",
        HALTING,
        (*ALL_HEADS, "EncoderModel"),
        has_stacks=True,
    ),
    "et": Variant(
        "Evolved Transformer",
        "evolved_transformer",
        "EvolvedTransformer",
        {},
        ("Model", "EncoderModel", "ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration"),
        has_stacks=True,
    ),
    "rnn": Variant("RNN", "act_rnn", "ActRnn", {"num_hidden_layers": 2}, HEADS),
    "rnn_act": Variant("RNN with ACT", "act_rnn", "ActRnn", {"halting": "act", "num_hidden_layers": 2}, HEADS),
}


@dataclass(frozen=True)
class Row:
    """A class of an architecture, built in one way."""

    variant_name: str
    kind: str

    @property
    def name(self) -> str:
        """Of the row in the table."""
        return f"{self.variant_name}-{self.kind}"

    @property
    def variant(self) -> Variant:
        """How the architecture is built."""
        return VARIANTS[self.variant_name]

    @property
    def class_name(self) -> str:
        """Of the public class."""
        return self.variant.prefix + self.kind

    @property
    def model_class(self) -> type:
        """The public class."""
        return getattr(hf_efficient, self.class_name)

    @property
    def auto_class(self) -> type:
        """The Auto class that loads it."""
        return getattr(transformers, AUTO_CLASSES[self.kind])

    @property
    def settings(self) -> dict[str, Any]:
        """Of the small model."""
        settings = dict(self.variant.settings)
        if self.variant.has_stacks:
            pair = self.kind == "ForConditionalGeneration"
            settings |= PAIR if pair else {"is_encoder_decoder": False}
            settings |= ENCODER if self.kind in ENCODERS or pair else DECODER
            if pair:
                settings["decoder_start_token_id"] = 1
        if self.kind in ("ForSequenceClassification", "ForTokenClassification"):
            settings["num_labels"] = 3
        return settings

    def build(self, dtype: torch.dtype = torch.float64, **changes: Any) -> torch.nn.Module:
        """The small model, in evaluation mode; float64, so that only a wrong formula makes a difference."""
        small_models = import_module(f"models.{self.variant.architecture}.small_models")
        settings = {"pad_token_id": 0} | self.settings | changes
        return small_models.small_model(self.model_class, dtype, **settings)


def rows() -> Iterator[Row]:
    """All of them."""
    for name, variant in VARIANTS.items():
        yield from (Row(name, kind) for kind in variant.kinds)


ROWS = list(rows())

__all__ = ["AUTO_CLASSES", "ROWS", "VARIANTS", "Row", "Variant"]
