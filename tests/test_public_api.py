"""The public names: there, exported, documented, and known to the Auto classes."""

import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import transformers

import hf_efficient

# What docs and users rely on. A room may export more; all of it must be documented.
PUBLIC = {
    "hf_efficient": {
        "ActRnnCache",
        "ActRnnConfig",
        "ActRnnForCausalLM",
        "ActRnnForSequenceClassification",
        "ActRnnForTokenClassification",
        "ActRnnModel",
        "EvolvedTransformerCache",
        "EvolvedTransformerConfig",
        "EvolvedTransformerEncoderModel",
        "EvolvedTransformerForCausalLM",
        "EvolvedTransformerForConditionalGeneration",
        "EvolvedTransformerForSequenceClassification",
        "EvolvedTransformerModel",
        "ReformerCache",
        "ReformerConfig",
        "ReformerForCausalLM",
        "ReformerForConditionalGeneration",
        "ReformerForMaskedLM",
        "ReformerForQuestionAnswering",
        "ReformerForSequenceClassification",
        "ReformerForTokenClassification",
        "ReformerModel",
        "ReformerModelWithLMHead",
        "ReformerTokenizer",
        "TransformerXLCache",
        "TransformerXLConfig",
        "TransformerXLForCausalLM",
        "TransformerXLForSequenceClassification",
        "TransformerXLForTokenClassification",
        "TransformerXLModel",
        "UniversalTransformerCache",
        "UniversalTransformerConfig",
        "UniversalTransformerEncoderModel",
        "UniversalTransformerForCausalLM",
        "UniversalTransformerForConditionalGeneration",
        "UniversalTransformerForMaskedLM",
        "UniversalTransformerForQuestionAnswering",
        "UniversalTransformerForSequenceClassification",
        "UniversalTransformerForTokenClassification",
        "UniversalTransformerModel",
    },
    "hf_efficient.conversion": {"convert_checkpoint"},
    "hf_efficient.data": {"SegmentCollator", "SegmentLanes", "load_documents", "load_tokenizer", "segment_lanes"}
    | {"tokenize_documents", "train_tokenizer"},
    "hf_efficient.hub": {"write_model_card"},
    "hf_efficient.ops": {"lsh_attention", "relative_attention", "reversible_sequence", "windowed_lsh_attention"},
    "hf_efficient.training": {"SegmentTrainer", "SegmentTrainingArguments", "bits_per_byte", "perplexity"},
}

AUTO_CLASSES = {
    "act_rnn": {
        "AutoModel": "ActRnnModel",
        "AutoModelForCausalLM": "ActRnnForCausalLM",
        "AutoModelForSequenceClassification": "ActRnnForSequenceClassification",
        "AutoModelForTokenClassification": "ActRnnForTokenClassification",
    },
    "evolved_transformer": {
        "AutoModel": "EvolvedTransformerModel",
        "AutoModelForCausalLM": "EvolvedTransformerForCausalLM",
        "AutoModelForPreTraining": "EvolvedTransformerForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "EvolvedTransformerForConditionalGeneration",
        "AutoModelForSequenceClassification": "EvolvedTransformerForSequenceClassification",
        "AutoModelForTextEncoding": "EvolvedTransformerEncoderModel",
    },
    "transfo-xl": {
        "AutoModel": "TransformerXLModel",
        "AutoModelForCausalLM": "TransformerXLForCausalLM",
        "AutoModelForSequenceClassification": "TransformerXLForSequenceClassification",
        "AutoModelForTokenClassification": "TransformerXLForTokenClassification",
    },
    "universal_transformer": {
        "AutoModel": "UniversalTransformerModel",
        "AutoModelForCausalLM": "UniversalTransformerForCausalLM",
        "AutoModelForMaskedLM": "UniversalTransformerForMaskedLM",
        "AutoModelForPreTraining": "UniversalTransformerForConditionalGeneration",
        "AutoModelForQuestionAnswering": "UniversalTransformerForQuestionAnswering",
        "AutoModelForSeq2SeqLM": "UniversalTransformerForConditionalGeneration",
        "AutoModelForSequenceClassification": "UniversalTransformerForSequenceClassification",
        "AutoModelForTextEncoding": "UniversalTransformerEncoderModel",
        "AutoModelForTokenClassification": "UniversalTransformerForTokenClassification",
    },
    "reformer": {
        "AutoModel": "ReformerModel",
        "AutoModelForCausalLM": "ReformerForCausalLM",
        "AutoModelForMaskedLM": "ReformerForMaskedLM",
        "AutoModelForPreTraining": "ReformerForCausalLM",
        "AutoModelForQuestionAnswering": "ReformerForQuestionAnswering",
        "AutoModelForSeq2SeqLM": "ReformerForConditionalGeneration",
        "AutoModelForSequenceClassification": "ReformerForSequenceClassification",
        "AutoModelForTextEncoding": "ReformerModel",
        "AutoModelForTokenClassification": "ReformerForTokenClassification",
    },
}
TINY = {
    "universal_transformer": {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8},
    "evolved_transformer": {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2},
    "act_rnn": {"vocab_size": 11, "hidden_size": 8},
    "transfo-xl": {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    },
    "reformer": {
        "vocab_size": 11,
        "hidden_size": 8,
        "attn_layers": ["lsh"],
        "axial_pos_embds_dim": [2, 6],
        "num_attention_heads": 2,
    },
}
# What a head asks of the configuration beyond that.
NEEDED = {
    "ReformerForCausalLM": {"is_decoder": True},
    "ReformerForConditionalGeneration": {"is_encoder_decoder": True, "decoder_start_token_id": 0},
}
MODELS = [(kind, auto, name) for kind, classes in AUTO_CLASSES.items() for auto, name in classes.items()]


def exported() -> list[tuple[str, str]]:
    """(room, name) of everything in the rooms' `__all__`."""
    return [(room, name) for room in PUBLIC for name in importlib.import_module(room).__all__]


@pytest.mark.parametrize("room", PUBLIC)
def test_promised_names_are_exported(room):
    assert PUBLIC[room] - set(importlib.import_module(room).__all__) == set()


@pytest.mark.parametrize("room", PUBLIC)
def test_exported_names_are_sorted_and_public(room):
    names = importlib.import_module(room).__all__
    assert names == sorted(names)
    assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize(("room", "name"), exported())
def test_exported_name_is_documented(room, name):
    found = getattr(importlib.import_module(room), name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return  # a constant is explained by the comment beside it
    assert found.__doc__, f"{name} has no docstring"
    # What a dataclass without a docstring gets from Python is its signature.
    assert not found.__doc__.startswith(f"{name}("), f"{name} has no docstring"


@pytest.mark.parametrize(("room", "name"), exported())
def test_public_methods_are_documented(room, name):
    found = getattr(importlib.import_module(room), name)
    own = vars(found) if inspect.isclass(found) and found.__module__.startswith("hf_efficient") else {}
    members = {key: getattr(value, "__func__", value) for key, value in own.items() if not key.startswith("_")}
    methods = {
        key: value for key, value in members.items() if inspect.isfunction(value) or isinstance(value, property)
    }
    assert {key for key, value in methods.items() if not value.__doc__} == set()


@pytest.mark.parametrize(("kind", "auto", "name"), MODELS)
def test_auto_class_builds_ours(kind, auto, name):
    config = transformers.AutoConfig.for_model(kind, **TINY[kind], **NEEDED.get(name, {}))
    assert type(config).__module__.startswith("hf_efficient.")
    assert type(getattr(transformers, auto).from_config(config)) is getattr(hf_efficient, name)


def test_no_auto_class_is_left_to_a_model_of_transformers():
    """`reformer` is a type of theirs: whatever class they have for it, ours takes its place."""
    tables = vars(transformers.models.auto.modeling_auto)
    config = hf_efficient.ReformerConfig
    for name, table in tables.items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING") and "reformer" in tables.get(f"{name}_NAMES", {}):
            assert table[config].__module__.startswith("hf_efficient."), name


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("hf_efficient") == hf_efficient.__version__


WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

EXTRAS = {"accelerate", "datasets", "matplotlib", "pandas", "peft", "pyarrow", "sacremoses"}


class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in EXTRAS else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras

import torch
import hf_efficient

config = hf_efficient.TransformerXLConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
hf_efficient.TransformerXLForCausalLM(config).generate(torch.tensor([[1, 2]]), max_new_tokens=2)
assert not EXTRAS & sys.modules.keys()
"""


def test_models_need_no_extra():
    """`import hf_efficient` must work where only the required packages are installed."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
