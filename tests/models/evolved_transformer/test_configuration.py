"""The configuration: what is accepted, what it becomes, and what is refused with which words."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models.evolved_transformer.small_models import STRUCTURES, small_config
from models.evolved_transformer.whole_models import STACKS
from transformers import AutoConfig

from hf_efficient import (
    EvolvedTransformerConfig,
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerModel,
)
from hf_efficient.models.evolved_transformer.presets import PRESETS

SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_wide_attention_heads",
    "vocab_size",
)
PROBABILITIES = ("activation_dropout", "attention_dropout", "classifier_dropout", "dropout", "label_smoothing")
# Each names the argument, the value that was given, and what to do instead.
ILLEGAL = [
    *[({name: value}, rf"{name}={value} is not positive.*from 1") for name in SIZES for value in (0, -3)],
    *[
        ({name: value}, rf"{name}={value} is outside \[0, 1\).*below 1")
        for name in PROBABILITIES
        for value in (-0.1, 1.0, float("nan"))
    ],
    *[
        ({"layer_norm_eps": value}, f"layer_norm_eps={value} is no positive number")
        for value in (0.0, -1.0, float("inf"))
    ],
    ({"hidden_size": 9, "num_attention_heads": 1}, "hidden_size=9 is odd.*make it even"),
    ({"num_attention_heads": 3}, "hidden_size=8 cannot be shared out to num_attention_heads=3.*multiple"),
    ({"num_wide_attention_heads": 3}, "hidden_size=8 .*3 heads of num_wide_attention_heads=3; set this to a divisor"),
    (
        {"hidden_size": 12, "num_attention_heads": 4},
        r"hidden_size=12 .*8 heads of num_wide_attention_heads=None \(None: by num_attention_heads\)",
    ),
    ({"position_signal": "rotary"}, "position_signal='rotary' is unknown; did you mean.*'sinusoid', 'none'"),
    ({"pooling": "max"}, "pooling='max' is unknown"),
    ({"is_encoder_decoder": True}, "is_decoder=True.*is_encoder_decoder=True.*one of them to False"),
    ({"encoder_input_bias": True}, "encoder_input_bias=True, but is_decoder=True.*False"),
    *[
        ({name: value}, rf"{name}={value} is outside the vocabulary of 17 ids.*None")
        for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
        for value in (-1, 17)
    ],
    ({"eos_token_id": [3, 40]}, "eos_token_id=40 is outside the vocabulary of 17 ids"),
    ({"zero_pad_embedding": True, "pad_token_id": None}, "zero_pad_embedding=True, but pad_token_id=None"),
    ({"intermediate_size": 33}, r"intermediate_size=33, but this number follows.*4 \* hidden_size; set hidden_size"),
    ({"num_hidden_layers": 3}, "num_hidden_layers=3, but this number follows.*num_decoder_layers"),
    ({"hiden_size": 8}, "'hiden_size' is no setting.*'hidden_size'"),
    ({"num_encoder_layer": 8}, "'num_encoder_layer' is no setting.*'num_encoder_layers'"),
    ({"num_wide_attention_head": 8}, "'num_wide_attention_head' is no setting.*'num_wide_attention_heads'"),
    ({"num_layers": 6}, "num_layers=6 is no setting.*give num_encoder_layers and num_decoder_layers"),
    ({"d_ff": 64}, "d_ff=64 is no setting.*give hidden_size"),
]
WRONG_TYPES = [
    ("vocab_size", "17"),
    ("hidden_size", 8.0),
    ("num_decoder_layers", None),
    ("num_encoder_layers", True),
    ("num_wide_attention_heads", "auto"),
    ("position_signal", None),
    ("dropout", "0.1"),
    ("label_smoothing", None),
    ("layer_norm_eps", "1e-6"),
    ("is_decoder", "yes"),
    ("is_encoder_decoder", 1),
    ("encoder_input_bias", 1),
    ("eos_token_id", "</s>"),
]


@pytest.mark.parametrize(("settings", "message"), ILLEGAL, ids=[str(settings) for settings, _ in ILLEGAL])
def test_illegal_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_config(**settings)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=[f"{name}={value!r}" for name, value in WRONG_TYPES])
def test_wrong_type_is_refused(name, value):
    with pytest.raises((StrictDataclassError, TypeError, ValueError)) as error:
        EvolvedTransformerConfig(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)


def test_every_field_has_a_check_or_cannot_be_wrong():
    """A field that is added must be looked at here: switches of a type need no more than the type."""
    tested = {name for settings, _ in ILLEGAL for name in settings} | {name for name, _ in WRONG_TYPES}
    harmless = {"scale_embeddings", "tie_word_embeddings", "use_cache"}
    assert set(EvolvedTransformerConfig.__annotations__) - tested - harmless == set()


def test_defaults_are_those_of_tensor2tensors_base():
    config = EvolvedTransformerConfig()
    assert (config.is_encoder_decoder, config.is_decoder) == (True, False)
    assert (config.hidden_size, config.num_attention_heads, config.wide_heads, config.head_dim) == (512, 8, 16, 64)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.intermediate_size) == (3, 4, 2048)
    assert config.to_dict() == EvolvedTransformerConfig.from_preset("base").to_dict()


@pytest.mark.parametrize(("heads", "wide"), [(1, 2), (4, 8), (8, 16), (16, 16), (32, 32)])
def test_wide_heads_follow_from_the_others(heads, wide):
    config = small_config(hidden_size=64, num_attention_heads=heads)
    assert config.wide_heads == wide
    assert config.num_wide_attention_heads is None
    assert small_config(hidden_size=64, num_attention_heads=heads, num_wide_attention_heads=4).wide_heads == 4


def test_wide_heads_are_no_matter_of_an_encoder():
    settings = {"hidden_size": 12, "num_attention_heads": 4} | STACKS["encoder"]
    EvolvedTransformerModel(small_config(**settings))


def test_stacks_follow_from_one_flag():
    assert not EvolvedTransformerConfig(is_decoder=True).is_encoder_decoder
    assert not EvolvedTransformerConfig(is_encoder_decoder=False).is_decoder


@pytest.mark.parametrize(("stacks", "layers"), [("encoder", 3), ("decoder", 8), ("both", 8)])
def test_numbers_that_follow_are_accepted_and_not_saved(stacks, layers):
    config = small_config(num_encoder_layers=3, num_decoder_layers=4, **STACKS[stacks])
    assert (config.num_hidden_layers, config.intermediate_size) == (layers, 32)
    for name in ("num_hidden_layers", "intermediate_size"):
        with pytest.raises(AttributeError):
            setattr(config, name, 3)
        assert name not in config.to_dict()
    # As files of other models have them.
    given = {"num_hidden_layers": layers, "intermediate_size": 32, "num_encoder_layers": 3, "num_decoder_layers": 4}
    assert small_config(**given, **STACKS[stacks]).to_dict() == config.to_dict()


def body_parameters(config: EvolvedTransformerConfig) -> float:
    """The paper's blocks as tensor2tensor's graph has them, counted in multiples of D² and D."""
    width = config.hidden_size
    encoder = config.num_encoder_layers * (21.5 * width**2 + 64 * width) + 2 * width
    decoder = config.num_decoder_layers * (28.5 * width**2 + 62.5 * width) + 2 * width
    return encoder + decoder + config.vocab_size * width


@pytest.mark.parametrize(("name", "millions"), [("tiny", 7.30), ("base", 64.30), ("big", 222.2), ("deep", 218.4)])
def test_preset_has_as_many_parameters_as_tensor2tensors(name, millions):
    """Counted by building its graphs with a vocabulary of 33,708; it adds a [32, D] table of target spaces."""
    config = EvolvedTransformerConfig.from_preset(name, vocab_size=33708)
    with torch.device("meta"):
        model = EvolvedTransformerForConditionalGeneration(config)
    number = model.num_parameters() + 32 * config.hidden_size
    assert number / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters_is_that_of_the_formula(name):
    config = EvolvedTransformerConfig.from_preset(name)
    with torch.device("meta"):
        model = EvolvedTransformerForConditionalGeneration(config)
    assert model.num_parameters() == body_parameters(config)


@pytest.mark.parametrize(("width", "heads"), [(16, 4), (40, 2), (512, 8)])
def test_language_model_without_encoder_has_as_many_parameters_as_the_formula(width, heads):
    """Both attentions to the encoder, 8 D² + 2 D in each block, are away."""
    config = EvolvedTransformerConfig(vocab_size=100, hidden_size=width, num_attention_heads=heads, is_decoder=True)
    with torch.device("meta"):
        model = EvolvedTransformerForCausalLM(config)
    block = 20.5 * width**2 + 60.5 * width
    assert model.num_parameters() == 4 * block + 2 * width + 100 * width


def test_meena_has_the_size_of_its_paper():
    """2.6 B parameters, one block that reads and thirteen that write."""
    config = EvolvedTransformerConfig.from_preset("meena")
    assert (config.num_encoder_layers, config.num_decoder_layers, config.wide_heads) == (1, 13, 32)
    assert body_parameters(config) / 1e9 == pytest.approx(2.6, abs=0.05)
    small = EvolvedTransformerConfig.from_preset("conversational")
    assert (small.num_encoder_layers, small.num_decoder_layers) == (1, 13)
    assert body_parameters(small) < 10e6


def test_preset_takes_changes_and_is_not_changed():
    config = EvolvedTransformerConfig.from_preset("deep", num_decoder_layers=2, dropout=0.0)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.dropout) == (9, 2, 0.0)
    assert PRESETS["deep"]["dropout"] == 0.3


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset 'tinny'; did you mean 'tiny'.*Known are tiny, base"):
        EvolvedTransformerConfig.from_preset("tinny")


@pytest.mark.parametrize("name", ["dropout", "layer_norm_eps", "label_smoothing"])
def test_whole_number_in_json_is_a_float(name):
    value = 1 if name == "layer_norm_eps" else 0
    assert getattr(EvolvedTransformerConfig.from_dict({name: value}), name) == value


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 5},
        {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
        {"problem_type": "regression"},
        {"dtype": "float32"},
        {"output_hidden_states": True},
        {"eos_token_id": [1, 2]},
        {"layer_norm_epsilon": 1e-5},
    ],
)
def test_settings_of_transformers_are_accepted(settings):
    small_config(**settings)


SAVED = {**STRUCTURES, **STACKS, "input_bias": {"encoder_input_bias": True, **STACKS["both"]}}


@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_saved_config_is_read_back(settings, tmp_path):
    config = small_config(**settings)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is EvolvedTransformerConfig
    assert read.to_diff_dict() == config.to_diff_dict()
    assert (read.is_decoder, read.is_encoder_decoder) == (config.is_decoder, config.is_encoder_decoder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pooling": "meen"}, "did you mean 'mean'"),
        ({"hidden_size": 12}, "hidden_size=12"),
        ({"intermediate_size": 3}, "intermediate_size=3"),
    ],
)
def test_illegal_file_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evolved_transformer"} | content))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"num_decoder_layers": 3}, {"num_decoder_layers": 3, "num_hidden_layers": 6}),
        ({"num_labels": 7}, {"num_labels": 7}),
        # Only legal together.
        ({"is_decoder": False, "is_encoder_decoder": True}, {"is_encoder_decoder": True}),
        ({"num_attention_heads": 3, "hidden_size": 12}, {"head_dim": 4, "wide_heads": 6}),
    ],
)
def test_override_at_loading_counts(override, expected, tmp_path):
    small_config().save_pretrained(tmp_path)
    for cls in (AutoConfig, EvolvedTransformerConfig):
        config = cls.from_pretrained(tmp_path, **override)
        assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"num_decoder_layers": 0}, "num_decoder_layers=0"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1"),
        ({"intermediate_size": 1}, "intermediate_size=1"),
    ],
)
def test_illegal_override_at_loading_is_refused(override, message, tmp_path):
    small_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **override)


def test_a_setting_changed_later_is_looked_at_when_a_model_is_built():
    config = small_config()
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        EvolvedTransformerModel(config)
