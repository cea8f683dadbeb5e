"""The configuration: what is accepted, what it becomes, and what is refused with which words."""

import copy
import json
import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models.universal_transformer.small_models import HALTING, STRUCTURES, small_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from hf_efficient import UniversalTransformerConfig, UniversalTransformerForCausalLM, UniversalTransformerModel
from hf_efficient.models.universal_transformer.presets import PRESETS, TENSOR2TENSOR_HALTING

ENCODER = {"is_decoder": False, "is_encoder_decoder": False}

# Each names the argument, the value that was given, and what to do instead.
ILLEGAL = [
    *[
        ({name: value}, rf"{name}={value} is not positive.*from 1")
        for name in (
            "backprop_steps",
            "hidden_size",
            "intermediate_size",
            "max_position_embeddings",
            "max_steps",
            "mean_training_steps",
            "min_steps",
            "num_attention_heads",
            "num_layers_in_group",
            "vocab_size",
        )
        for value in (0, -3)
    ],
    *[
        ({name: -1}, rf"{name}=-1 is negative.*from 0")
        for name in ("max_position_offset", "num_coda_layers", "num_prelude_layers")
    ],
    *[
        ({name: value}, rf"{name}={value} is outside \[0, 1\).*below 1")
        for name in ("activation_dropout", "attention_dropout", "classifier_dropout", "dropout", "label_smoothing")
        for value in (1.0, 1, -0.1, float("nan"))
    ],
    *[
        ({name: value}, rf"{name}={value} is no positive number.*above 0")
        for name in ("layer_norm_eps", "rope_theta")
        for value in (0.0, -1e-5, float("nan"), float("inf"))
    ],
    *[
        ({"halting_threshold": value}, rf"halting_threshold={value} is outside \(0, 1\).*0.99")
        for value in (0.0, 1.0, -0.5, 1.5, float("nan"))
    ],
    *[({"ponder_cost": value}, f"ponder_cost={value} is no cost") for value in (-0.1, float("nan"), float("inf"))],
    ({"halting_bias_init": float("nan")}, "halting_bias_init=nan is not finite.*such as 1"),
    ({"min_steps": 6}, "min_steps=6 is more than max_steps=5; make it 5 or less"),
    ({"halting": "atc"}, "halting='atc' is unknown; did you mean 'act'.*'none', 'act'"),
    ({"halted_states": "copied"}, "halted_states='copied' is unknown; did you mean 'copy'"),
    ({"halted_keys": "refreshed"}, "halted_keys='refreshed' is unknown; did you mean 'refresh'"),
    ({"act_output": "sum"}, "act_output='sum' is unknown; did you mean 'weighted_sum'"),
    ({"norm_position": "sandwich"}, "norm_position='sandwich' is unknown"),
    ({"transition": "sepconv"}, "transition='sepconv' is unknown"),
    ({"position_signal": "rope"}, "position_signal='rope' is unknown"),
    ({"step_signal": "rotary"}, "step_signal='rotary' is unknown"),
    ({"coordinate_combination": "sum"}, "coordinate_combination='sum' is unknown"),
    ({"share_cache": "first_step"}, "share_cache='first_step' is unknown; did you mean 'last_step'.*None"),
    ({"random_depth": "poisson"}, "random_depth='poisson' is unknown; did you mean 'poisson_lognormal'"),
    ({"pooling": "max"}, "pooling='max' is unknown"),
    ({"hidden_act": "rleu"}, "hidden_act='rleu' is unknown.*'relu'"),
    ({"num_attention_heads": 3}, "hidden_size=8 cannot be shared out to num_attention_heads=3.*multiple"),
    ({"position_signal": "rotary", "num_attention_heads": 8}, "position_signal='rotary'.*a head is 1 wide.*even"),
    ({"is_encoder_decoder": True}, "is_decoder=True.*is_encoder_decoder=True.*one of them to False"),
    ({"encoder_input_bias": True}, "encoder_input_bias=True, but is_decoder=True.*False"),
    ({"halting": "act", "halting_scope": "sequence"}, "halting_scope='sequence'.*causal.*use 'token'"),
    (
        {"halting": "act", "halting_scope": "sequence", "is_decoder": False, "is_encoder_decoder": True},
        "halting_scope='sequence'.*causal.*is_encoder_decoder=False",
    ),
    ({"step_position_offset": True}, "step_position_offset=True.*causal.*set it to False"),
    ({"step_position_offset": True, "position_signal": "rotary", **ENCODER}, "step_position_offset=True.*'rotary'"),
    ({"step_position_offset": True, "position_signal": "learned", **ENCODER}, "step_position_offset=True.*'learned'"),
    ({"step_position_offset": True, "max_position_offset": 3, **ENCODER}, "max_position_offset=3.*one of them"),
    (
        {"max_position_offset": 9, "position_signal": "none"},
        "max_position_offset=9 has no effect.*'none'.*leave it out",
    ),
    ({"max_position_offset": 9, "position_signal": "rotary"}, "max_position_offset=9 has no effect.*'rotary'"),
    (
        {"max_position_offset": 40, "position_signal": "learned", "max_position_embeddings": 40},
        "max_position_offset=40 leaves no room in max_position_embeddings=40",
    ),
    (
        {"coordinate_combination": "concat", "position_signal": "rotary", "step_signal": "none"},
        "'concat'.*'rotary'.*step_signal='none'.*use 'add'",
    ),
    ({"halting": "act", "halted_states": "evolving", "halted_keys": "stale"}, "halted_keys='stale'.*'evolving'"),
    ({"pack_live_positions": True}, "pack_live_positions=True, but halting='none'.*None or False"),
    (
        {"pack_live_positions": True, "halting": "act", "halted_states": "evolving"},
        "pack_live_positions=True, but halted_states='evolving'.*None or False",
    ),
    (
        {"pack_live_positions": True, "halting": "act", "transition": "separable_convolution"},
        "pack_live_positions=True, but transition='separable_convolution'.*None or False",
    ),
    ({"random_depth": "uniform", "halting": "act"}, "random_depth='uniform', but with halting='act'"),
    ({"mean_training_steps": 3}, "mean_training_steps=3 has no effect.*'poisson_lognormal'"),
    ({"mean_training_steps": 3, "random_depth": "uniform"}, "mean_training_steps=3 has no effect.*'uniform'"),
    ({"backprop_steps": 2}, "backprop_steps=2 cuts the embeddings off.*input_injection=True"),
    ({"backprop_steps": 2, "input_injection": True, "halting": "act"}, "backprop_steps=2.*halting='none'"),
    *[
        ({name: value}, rf"{name}={value} is outside the vocabulary of 17 ids.*None")
        for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
        for value in (-1, 17)
    ],
    ({"eos_token_id": [3, 40]}, "eos_token_id=40 is outside the vocabulary of 17 ids"),
    ({"zero_pad_embedding": True, "pad_token_id": None}, "zero_pad_embedding=True, but pad_token_id=None"),
    *[
        ({"recurrence": name}, f"recurrence='{name}' is not supported: no table of the paper uses it")
        for name in ("gru", "lstm", "highway", "skip", "dwa")
    ],
    ({"recurrence": "basic"}, "recurrence='basic' is no setting here.*halting"),
    ({"num_hidden_layers": 3}, "num_hidden_layers=3, but this number follows.*max_steps and num_layers_in_group"),
    ({"hiden_size": 8}, "'hiden_size' is no setting.*'hidden_size'"),
    ({"max_step": 8}, "'max_step' is no setting.*'max_steps'"),
    ({"halting_treshold": 0.9}, "'halting_treshold' is no setting.*'halting_threshold'"),
    ({"ponder_costs": 0.1}, "'ponder_costs' is no setting.*'ponder_cost'"),
    ({"num_layer_in_group": 2}, "'num_layer_in_group' is no setting.*'num_layers_in_group'"),
    ({"d_model": 8}, "d_model=8 is no setting.*give hidden_size"),
    ({"num_layers": 6}, "num_layers=6 is no setting.*give max_steps"),
    ({"halting": "ACT"}, "halting='ACT' is unknown; did you mean 'act'"),
]
WRONG_TYPES = [
    ("vocab_size", "17"),
    ("hidden_size", 8.0),
    ("max_steps", None),
    ("max_steps", True),
    ("halting", None),
    ("halting", True),
    ("halting_threshold", "0.99"),
    ("min_steps", 1.5),
    ("force_final_halt", 1),
    ("pack_live_positions", "yes"),
    ("share_cache", True),
    ("random_depth", 3),
    ("backprop_steps", "all"),
    ("dropout", "0.1"),
    ("is_decoder", "yes"),
    ("eos_token_id", "</s>"),
    ("ponder_cost", None),
]


@pytest.mark.parametrize(("settings", "message"), ILLEGAL, ids=[str(settings) for settings, _ in ILLEGAL])
def test_illegal_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_config(**settings)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=[f"{name}={value!r}" for name, value in WRONG_TYPES])
def test_wrong_type_is_refused(name, value):
    with pytest.raises((StrictDataclassError, TypeError, ValueError)) as error:
        UniversalTransformerConfig(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)


def test_every_field_has_a_check_or_cannot_be_wrong():
    """A field that is added must be looked at here: switches and ids of a type need no more than the type."""
    tested = {name for settings, _ in ILLEGAL for name in settings} | {name for name, _ in WRONG_TYPES}
    harmless = {"count_padding", "halting_norm", "scale_embeddings", "tie_word_embeddings", "use_cache"}
    assert set(UniversalTransformerConfig.__annotations__) - tested - harmless - {"input_injection"} == set()


@pytest.mark.parametrize("settings", [*HALTING.values(), *STRUCTURES.values()], ids=[*HALTING, *STRUCTURES])
def test_variant_is_legal(settings):
    small_config(**settings).validate()


def test_default_config_builds():
    config = UniversalTransformerConfig()
    assert (config.is_encoder_decoder, config.is_decoder) == (True, False)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (512, 8, 64)
    small = UniversalTransformerConfig(vocab_size=11, hidden_size=16)
    assert UniversalTransformerModel(small).config is small


def test_stacks_follow_from_one_flag():
    assert not UniversalTransformerConfig(is_decoder=True).is_encoder_decoder
    assert not UniversalTransformerConfig(is_encoder_decoder=False).is_decoder


@pytest.mark.parametrize(
    ("settings", "slots", "blocks"),
    [
        ({}, 5, 1),
        ({"num_layers_in_group": 2}, 10, 2),
        ({"num_layers_in_group": 2, "num_prelude_layers": 3, "num_coda_layers": 1}, 14, 6),
        ({"num_layers_in_group": 2, "num_prelude_layers": 1, "share_cache": "last_step"}, 3, 3),
        ({"max_steps": 1, "num_layers_in_group": 6, "step_signal": "none"}, 6, 6),
    ],
)
def test_number_of_layers(settings, slots, blocks):
    config = small_config(**settings)
    assert (config.num_hidden_layers, config.num_distinct_layers) == (slots, blocks)
    assert len(DynamicCache(config=config.get_text_config(decoder=True)).layers) == slots
    with pytest.raises(AttributeError):
        config.num_hidden_layers = 3
    # As files of other models have it; what follows from the rest is accepted.
    assert small_config(**settings, num_hidden_layers=slots).to_dict() == config.to_dict()
    assert "num_hidden_layers" not in config.to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_legal(name):
    config = UniversalTransformerConfig.from_preset(name)
    assert config.hidden_size == PRESETS[name]["hidden_size"]
    assert config.is_halting == ("adaptive" in name or name == "concat_tiny")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("teeny", (128, 128, 2, 10)),
        ("tiny", (128, 512, 4, 8)),
        ("adaptive_tiny", (128, 512, 4, 4)),
        ("small", (512, 2048, 8, 6)),
        ("adaptive_small", (512, 2048, 8, 12)),
        ("tall", (512, 2048, 8, 16)),
        ("adaptive_tall", (512, 2048, 8, 24)),
        ("base", (1024, 4096, 16, 6)),
        ("adaptive_base", (1024, 4096, 16, 12)),
        ("big", (2048, 8192, 16, 6)),
        ("sepconv_base", (1024, 4096, 16, 6)),
        ("concat_tiny", (128, 512, 4, 4)),
    ],
)
def test_preset_has_the_sizes_of_tensor2tensor(name, expected):
    config = UniversalTransformerConfig.from_preset(name)
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.max_steps)
    assert sizes == expected


# Counted by building tensor2tensor's graphs with a vocabulary of 33,708; it adds a [32, D] table of target spaces.
@pytest.mark.parametrize(
    ("name", "millions"), [("teeny", 4.59), ("tiny", 4.78), ("small", 24.6), ("base", 63.9), ("sepconv_base", 64.0)]
)
def test_preset_has_as_many_parameters_as_tensor2tensor_s(name, millions):
    with torch.device("meta"):
        config = UniversalTransformerConfig.from_preset(name, vocab_size=33708)
        model = UniversalTransformerModel(config)
    number = sum(parameter.numel() for parameter in model.parameters()) + 32 * config.hidden_size
    assert number / 1e6 == pytest.approx(millions, rel=3e-3)


def test_preset_takes_changes_and_is_not_changed():
    config = UniversalTransformerConfig.from_preset("adaptive_tiny", max_steps=3, **TENSOR2TENSOR_HALTING)
    assert (config.max_steps, config.halted_states, config.halting_norm) == (3, "evolving", False)
    assert PRESETS["adaptive_tiny"]["max_steps"] == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "no preset 'tinny'; did you mean 'tiny'.*Known are teeny, tiny"),
        ("gru_base", "'gru_base' needs tensor2tensor's 'gru' recurrence.*no table of the paper"),
        ("dwa_tiny_test", "'dwa'"),
        ("highway_base", "'highway'"),
    ],
)
def test_unknown_preset_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        UniversalTransformerConfig.from_preset(name)


@pytest.mark.parametrize("name", ["dropout", "layer_norm_eps", "ponder_cost", "halting_bias_init", "rope_theta"])
def test_whole_number_in_json_is_a_float(name):
    value = 0 if name in ("dropout", "ponder_cost") else 1
    assert getattr(UniversalTransformerConfig.from_dict({name: value}), name) == value


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 5},
        {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
        {"problem_type": "regression"},
        {"dtype": "float32"},
        {"architectures": ["X"]},
        {"task_specific_params": {"text-generation": {"do_sample": True}}},
        {"output_hidden_states": True},
        {"name_or_path": "somewhere"},
        {"eos_token_id": [1, 2]},
    ],
)
def test_settings_of_transformers_are_accepted(settings):
    small_config(**settings)


@pytest.mark.parametrize("settings", [*HALTING.values(), *STRUCTURES.values()], ids=[*HALTING, *STRUCTURES])
def test_saved_config_is_read_back(settings, tmp_path):
    config = small_config(**settings)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is UniversalTransformerConfig
    assert read.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("stacks", [ENCODER, {"is_decoder": False, "is_encoder_decoder": True}, {}])
def test_stacks_are_saved(stacks, tmp_path):
    config = small_config(**stacks)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.is_decoder, read.is_encoder_decoder) == (config.is_decoder, config.is_encoder_decoder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"halting": "atc"}, "did you mean 'act'"),
        ({"hidden_size": 12}, "hidden_size=12"),
        ({"max_steps": 2, "min_steps": 3}, "min_steps=3"),
        ({"recurrence": "lstm"}, "recurrence='lstm'"),
    ],
)
def test_illegal_file_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "universal_transformer"} | content))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"max_steps": 3}, {"max_steps": 3, "num_hidden_layers": 3}),
        ({"num_labels": 7}, {"num_labels": 7}),
        ({"is_decoder": False, "is_encoder_decoder": True}, {"is_encoder_decoder": True}),
        # Only legal together.
        ({"max_steps": 9, "min_steps": 7}, {"min_steps": 7}),
        ({"num_attention_heads": 3, "hidden_size": 12}, {"head_dim": 4}),
    ],
)
def test_override_at_loading_counts(override, expected, tmp_path):
    small_config().save_pretrained(tmp_path)
    for cls in (AutoConfig, UniversalTransformerConfig):
        config = cls.from_pretrained(tmp_path, **override)
        assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"max_steps": 0}, "max_steps=0"),
        ({"halting_threshold": 2.0}, "halting_threshold=2.0"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1"),
    ],
)
def test_illegal_override_at_loading_is_refused(override, message, tmp_path):
    small_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize("cls", [UniversalTransformerModel, UniversalTransformerForCausalLM])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", -1),
        ("halting", "atc"),
        ("halting_threshold", 1.0),
        ("hidden_size", 9),
        ("halting_scope", "sequence"),
    ],
)
def test_illegal_value_set_later_is_refused_when_a_model_is_built_or_the_config_saved(cls, name, value, tmp_path):
    config = small_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{name}="):
        cls(config)
    auto_class = AutoModel if cls is UniversalTransformerModel else AutoModelForCausalLM
    with pytest.raises(ValueError, match=f"{name}="):
        auto_class.from_config(config)
    with pytest.raises((StrictDataclassError, ValueError), match=f"{name}="):
        config.save_pretrained(tmp_path)


def test_wrong_type_set_later_is_refused():
    config = small_config()
    with pytest.raises(StrictDataclassError, match="max_steps"):
        config.max_steps = "3"


def test_config_can_be_copied_and_pickled():
    config = small_config(halting="act", eos_token_id=[2, 4], id2label={0: "a", 1: "b"})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is UniversalTransformerConfig
        assert other.to_dict() == config.to_dict()
        assert other.num_hidden_layers == 5
    other.eos_token_id.append(12)
    assert config.eos_token_id == [2, 4]
    assert UniversalTransformerConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
