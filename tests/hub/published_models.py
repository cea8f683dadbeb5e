"""A small model for every Auto class of every architecture, saved as training leaves one, with what it computes."""

import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from models.model_tools import QUIET, VOCAB_SIZE, random_ids, word_tokenizer
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

import hf_efficient
from hf_efficient import ReformerTokenizer
from hf_efficient.hub import write_model_card
from hf_efficient.models.transformer_xl import TransformerXLTokenizer

REPORT = {
    "parameters": 1_234_567,
    "command": "hf-efficient train --text my.txt --output_dir runs/mine",
    "settings": {"text": ["/home/me/my.txt"], "max_steps": 10, "model": {"mem_len": 32}},
    "steps": 10,
    "train_tokens": 5120,
    "train_seconds": 12.3,
    "tokens_per_second": 416.3,
    "peak_memory_mb": 612.4,
    "data": {"text": ["/home/me/my.txt"], "tokens": 2000, "bytes": 4000},
    "validation": {
        "text": ["held_out.txt"],
        "tokens": 500,
        "bytes": 1000,
        "segment_length": 16,
        "mem_len": 32,
        "loss": 2.5,
        "perplexity": 12.18249,
        "bits_per_byte": 1.80337,
    },
    "hardware": "A processor, 2 threads",
    "versions": {"python": "3.11", "hf_efficient": "0.1.0"},
    "date": "2026-01-02",
}


@dataclass(frozen=True)
class Row:
    """A class to save, the Auto class that loads it, and settings of its small model."""

    architecture: str
    class_name: str
    auto_class: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the repository."""
        return f"{self.architecture}-{self.auto_class}".replace("_", "-").lower()


DECODER, ENCODER = {"is_decoder": True}, {"is_decoder": False}
PAIR = ENCODER | {"is_encoder_decoder": True}
REFORMER = {"attn_layers": ["local", "lsh", "windowed_lsh", "full"]}
HALTING = {"halting": "act", "num_layers_in_group": 2}
ALONE = {"is_encoder_decoder": False}
XL, RNN, UT, ET = "transformer_xl", "act_rnn", "universal_transformer", "evolved_transformer"
ROWS = [
    Row(XL, "TransformerXLForCausalLM", "AutoModelForCausalLM"),
    Row(XL, "TransformerXLModel", "AutoModel"),
    Row(XL, "TransformerXLForSequenceClassification", "AutoModelForSequenceClassification", {"num_labels": 3}),
    Row(XL, "TransformerXLForTokenClassification", "AutoModelForTokenClassification", {"num_labels": 3}),
    Row("reformer", "ReformerForCausalLM", "AutoModelForCausalLM", REFORMER | DECODER),
    Row("reformer", "ReformerModel", "AutoModel", REFORMER | DECODER),
    Row("reformer", "ReformerModel", "AutoModelForTextEncoding", REFORMER | ENCODER),
    Row("reformer", "ReformerForCausalLM", "AutoModelForPreTraining", REFORMER | DECODER),
    Row("reformer", "ReformerForMaskedLM", "AutoModelForMaskedLM", REFORMER | ENCODER),
    Row("reformer", "ReformerForSequenceClassification", "AutoModelForSequenceClassification", REFORMER | ENCODER),
    Row("reformer", "ReformerForTokenClassification", "AutoModelForTokenClassification", REFORMER | ENCODER),
    Row("reformer", "ReformerForQuestionAnswering", "AutoModelForQuestionAnswering", REFORMER | ENCODER),
    Row(
        "reformer",
        "ReformerForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        REFORMER | PAIR | {"decoder_start_token_id": 1},
    ),
    Row(UT, "UniversalTransformerForCausalLM", "AutoModelForCausalLM", HALTING),
    Row(UT, "UniversalTransformerModel", "AutoModel", HALTING),
    Row(UT, "UniversalTransformerEncoderModel", "AutoModelForTextEncoding", HALTING | ENCODER | ALONE),
    Row(UT, "UniversalTransformerForMaskedLM", "AutoModelForMaskedLM", ENCODER | ALONE),
    Row(
        UT,
        "UniversalTransformerForSequenceClassification",
        "AutoModelForSequenceClassification",
        HALTING | ENCODER | ALONE,
    ),
    Row(UT, "UniversalTransformerForTokenClassification", "AutoModelForTokenClassification", ENCODER | ALONE),
    Row(UT, "UniversalTransformerForQuestionAnswering", "AutoModelForQuestionAnswering", ENCODER | ALONE),
    Row(UT, "UniversalTransformerForConditionalGeneration", "AutoModelForSeq2SeqLM", HALTING | PAIR),
    Row(UT, "UniversalTransformerForConditionalGeneration", "AutoModelForPreTraining", PAIR),
    Row(ET, "EvolvedTransformerForCausalLM", "AutoModelForCausalLM"),
    Row(ET, "EvolvedTransformerModel", "AutoModel"),
    Row(ET, "EvolvedTransformerEncoderModel", "AutoModelForTextEncoding", ENCODER | ALONE),
    Row(ET, "EvolvedTransformerForSequenceClassification", "AutoModelForSequenceClassification", ENCODER | ALONE),
    Row(ET, "EvolvedTransformerForConditionalGeneration", "AutoModelForSeq2SeqLM", PAIR),
    Row(ET, "EvolvedTransformerForConditionalGeneration", "AutoModelForPreTraining", PAIR),
    Row(RNN, "ActRnnForCausalLM", "AutoModelForCausalLM", {"halting": "act", "num_hidden_layers": 2}),
    Row(RNN, "ActRnnModel", "AutoModel", {"cell": "gru"}),
    Row(RNN, "ActRnnForSequenceClassification", "AutoModelForSequenceClassification"),
    Row(RNN, "ActRnnForTokenClassification", "AutoModelForTokenClassification", {"halting": "act"}),
]
# One of each architecture, for the quick tests.
QUICK_ROWS = [row for row in ROWS if row.auto_class == "AutoModelForCausalLM"]


def model_type(architecture: str) -> str:
    """What config.json calls an architecture."""
    return import_module(f"models.{architecture}.small_models").small_config().model_type


def own_tokenizer(architecture: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the words w0 to w16, of the architecture's own class where it has one."""
    words = word_tokenizer()
    if architecture == XL:
        return TransformerXLTokenizer(vocab=[f"w{index}" for index in range(VOCAB_SIZE)], splitting="whitespace")
    if architecture == "reformer":
        return ReformerTokenizer(tokenizer_object=words.backend_tokenizer, pad_token="w0")
    return words


def save_published(row: Row, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Save a row's model in `folder`, which is made: model, tokenizer, card, picture and report."""
    small_models = import_module(f"models.{row.architecture}.small_models")
    model = small_models.small_model(getattr(hf_efficient, row.class_name), **row.settings)
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    (folder / "loss.png").write_bytes(b"\x89PNG a curve")
    report = json.dumps(REPORT | {"architecture": row.architecture})
    (folder / "report.json").write_text(report, encoding="utf-8")
    write_model_card(folder, license="mit")
    return folder


def save_expected(row: Row, saved: Path, path: Path) -> None:
    """Write what the saved model computes, for programs that load it elsewhere to compare with."""
    auto_class = getattr(transformers, row.auto_class)
    model = auto_class.from_pretrained(saved)
    ids = random_ids(2, 12)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        tensors["decoder_input_ids"] = random_ids(2, 7, seed=2)
    with torch.no_grad():
        expected = {"output": model(**tensors)[0]}
    if row.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        expected["generated"] = model.generate(ids, max_new_tokens=8, **QUIET)
    save_file({name: tensor.contiguous() for name, tensor in (tensors | expected).items()}, path)
