"""The configuration: what is accepted, what it becomes, and what is refused with which words."""

import copy
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassError
from models.transformer_xl.small_models import small_config
from transformers import AutoConfig, AutoModelForCausalLM

from hf_efficient import TransformerXLConfig, TransformerXLForCausalLM

# As it stood beside the weights of transfo-xl-wt103.
WT103 = {
    "adaptive": True,
    "architectures": ["TransfoXLLMHeadModel"],
    "attn_type": 0,
    "clamp_len": 1000,
    "cutoffs": [20000, 40000, 200000],
    "d_embed": 1024,
    "d_head": 64,
    "d_inner": 4096,
    "d_model": 1024,
    "div_val": 4,
    "dropatt": 0.0,
    "dropout": 0.1,
    "eos_token_id": 0,
    "ext_len": 0,
    "init": "normal",
    "init_range": 0.01,
    "init_std": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mem_len": 1600,
    "model_type": "transfo-xl",
    "n_head": 16,
    "n_layer": 18,
    "n_token": 267735,
    "pre_lnorm": False,
    "proj_init_std": 0.01,
    "same_length": True,
    "sample_softmax": -1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 250}},
    "tgt_len": 128,
    "tie_projs": [False, True, True, True],
    "tie_weight": True,
    "untie_r": True,
    "vocab_size": 267735,
}
WT103_FIELDS = {
    "vocab_size": 267735,
    "hidden_size": 1024,
    "embedding_size": 1024,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "head_dim": 64,
    "intermediate_size": 4096,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "memory_init": "zeros",
    "pre_norm": False,
    "untie_r": True,
    "cutoffs": [20000, 40000, 200000],
    "div_val": 4,
    "tie_projs": [False, True, True, True],
    "tie_word_embeddings": True,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
    "init_method": "normal",
    "initializer_range": 0.02,
    "init_range": 0.01,
    "proj_init_std": 0.01,
    "eos_token_id": 0,
}
ALIASES = {
    "n_token": ("vocab_size", 99),
    "d_model": ("hidden_size", 20),
    "d_embed": ("embedding_size", 6),
    "n_layer": ("num_hidden_layers", 3),
    "n_head": ("num_attention_heads", 5),
    "d_head": ("head_dim", 7),
    "d_inner": ("intermediate_size", 11),
    "pre_lnorm": ("pre_norm", True),
    "dropatt": ("attention_dropout", 0.25),
    "tie_weight": ("tie_word_embeddings", False),
    "init": ("init_method", "uniform"),
    "init_std": ("initializer_range", 0.5),
}

# Each names the argument, the value that was given, and what to do instead.
ILLEGAL = [
    *[
        ({name: value}, rf"{name}={value} is not positive.*from 1")
        for name in (
            "vocab_size",
            "hidden_size",
            "embedding_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "div_val",
        )
        for value in (0, -3)
    ],
    ({"hidden_size": 9}, "hidden_size=9 is odd.*even number"),
    ({"mem_len": -1}, "mem_len=-1 is negative.*0 to turn the memory off"),
    ({"clamp_len": -2}, "clamp_len=-2.*-1 to turn it off"),
    ({"same_length": True, "mem_len": 0}, "same_length=True.*mem_len=0.*at least 1 or same_length=False"),
    *[
        ({name: value}, rf"{name}={value} is outside \[0, 1\).*below 1")
        for name in ("dropout", "attention_dropout")
        for value in (1.0, 1, -0.1, float("nan"), float("inf"))
    ],
    *[
        ({name: value}, rf"{name}={value} is no positive number.*give")
        for name in ("layer_norm_epsilon", "initializer_range", "init_range", "proj_init_std")
        for value in (0.0, -1e-5, float("nan"), float("inf"))
    ],
    ({"memory_init": "zero"}, "memory_init='zero' is unknown.*empty, zeros"),
    ({"init_method": "xavier"}, "init_method='xavier' is unknown.*normal, uniform"),
    ({"init": "norm"}, "init_method='norm' is unknown.*normal, uniform"),
    ({"cutoffs": [0, 5]}, r"cutoffs=\[0, 5\] must ascend.*vocab_size=17.*\[\]"),
    ({"cutoffs": [5, 5]}, r"cutoffs=\[5, 5\] must ascend"),
    ({"cutoffs": [9, 5]}, r"cutoffs=\[9, 5\] must ascend"),
    ({"cutoffs": [17]}, r"cutoffs=\[17\] must ascend"),
    ({"cutoffs": [-5, 3]}, r"cutoffs=\[-5, 3\] must ascend"),
    ({"cutoffs": [5], "tie_projs": [True]}, r"tie_projs=\[True\] has 1 entries for 2 bins.*None"),
    ({"cutoffs": [5], "tie_projs": [True] * 3}, r"tie_projs=\[True, True, True\] has 3 entries for 2 bins.*None"),
    ({"tie_projs": []}, r"tie_projs=\[\] has 0 entries for 1 bins.*None"),
    ({"cutoffs": [5, 9], "div_val": 4, "embedding_size": 8}, "embedding_size=8 shrinks to width 0.*div_val=4.*use"),
    *[
        ({name: value}, rf"{name}={value} is outside the vocabulary of 17 ids.*None")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for value in (-1, 17)
    ],
    ({"eos_token_id": [3, 40]}, "eos_token_id=40 is outside the vocabulary of 17 ids"),
    ({"attn_type": 1}, r"attn_type=1 \(Shaw.*only attn_type=0"),
    ({"attn_type": 2}, r"attn_type=2 \(Vaswani.*only attn_type=0"),
    ({"attn_type": 3}, r"attn_type=3 \(Al-Rfou.*only attn_type=0"),
    ({"attn_type": 4}, r"attn_type=4 \(unknown\).*only attn_type=0"),
    ({"sample_softmax": 100}, "sample_softmax=100 is not supported.*-1"),
    ({"ext_len": 3}, "ext_len=3 is not supported.*0"),
    ({"hiden_size": 8}, "'hiden_size' is no setting.*'hidden_size'"),
    ({"n_layers": 2}, "'n_layers' is no setting.*'n_layer'"),
    ({"num_layer": 2}, "'num_layer' is no setting.*'n.*layer.*'"),
    ({"memlen": 2}, "'memlen' is no setting.*'mem_len'"),
    ({"tie_proj": [True]}, "'tie_proj' is no setting.*'tie_projs'"),
    ({"cutoff": [3]}, "'cutoff' is no setting.*'cutoffs'"),
    ({"pre_norm": True, "pre_lnorm": False}, "pre_norm=True.*pre_lnorm=False disagree"),
    ({"hidden_size": 8, "d_model": 10}, "hidden_size=8.*d_model=10 disagree"),
]
WRONG_TYPES = [
    ("vocab_size", "17"),
    ("vocab_size", 17.0),
    ("hidden_size", None),
    ("num_hidden_layers", True),
    ("mem_len", 1.5),
    ("clamp_len", None),
    ("same_length", "yes"),
    ("same_length", 1),
    ("memory_init", None),
    ("pre_norm", 0),
    ("cutoffs", 5),
    ("cutoffs", [1.5]),
    ("cutoffs", None),
    ("tie_projs", [0, 1]),
    ("tie_word_embeddings", None),
    ("dropout", "0.1"),
    ("layer_norm_epsilon", "1e-5"),
    ("initializer_range", None),
    ("eos_token_id", "</s>"),
    ("n_token", "17"),
    ("n_layer", 2.0),
    ("n_head", True),
    ("pre_lnorm", "yes"),
    ("tie_weight", 1),
    ("dropatt", "0.1"),
]


@pytest.mark.parametrize(("settings", "message"), ILLEGAL, ids=[str(settings) for settings, _ in ILLEGAL])
def test_illegal_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_config(**settings)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=[f"{name}={value!r}" for name, value in WRONG_TYPES])
def test_wrong_type_is_refused(name, value):
    field = TransformerXLConfig.attribute_map.get(name, name)
    with pytest.raises((StrictDataclassError, TypeError, ValueError)) as error:
        TransformerXLConfig(**{name: value})
    assert field in str(error.value)
    assert str(value).strip("[]") in str(error.value)


def test_default_config_is_legal_and_builds():
    config = TransformerXLConfig()
    assert config.memory_init == "empty"
    assert (config.embedding_size, config.head_dim) == (512, 64)
    assert not config.is_adaptive
    assert config.tie_projs == [False]
    small_config().validate()


@pytest.mark.parametrize("alias", ALIASES)
def test_older_name_is_accepted_read_and_written(alias):
    name, value = ALIASES[alias]
    config = TransformerXLConfig(**{alias: value})
    assert getattr(config, name) == value
    assert getattr(config, alias) == value
    assert config.to_dict()[name] == value
    assert alias not in config.to_dict()
    setattr(config, alias, getattr(config, name))
    assert config.to_dict() == TransformerXLConfig(**{name: value}).to_dict()


def test_every_older_name_is_covered():
    assert set(ALIASES) | {"layer_norm_eps"} == set(TransformerXLConfig.attribute_map)


def test_widths_follow_from_others():
    config = TransformerXLConfig(hidden_size=48, num_attention_heads=6)
    assert (config.embedding_size, config.head_dim) == (48, 8)
    config = TransformerXLConfig(d_model=48, n_head=6)
    assert (config.embedding_size, config.head_dim) == (48, 8)
    config = TransformerXLConfig(hidden_size=48, embedding_size=12, head_dim=5)
    assert (config.embedding_size, config.head_dim) == (12, 5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [False, True, True]),
        ({"proj_share_all_but_first": True}, [False, True, True]),
        ({"proj_share_all_but_first": False}, [False, False, False]),
        ({"tie_projs": [True, False, True], "proj_share_all_but_first": True}, [True, False, True]),
        ({"tie_projs": (True, True, True)}, [True, True, True]),
    ],
)
def test_projections_that_are_tied(settings, expected):
    assert small_config(cutoffs=[5, 11], **settings).tie_projs == expected


@pytest.mark.parametrize(
    ("settings", "is_adaptive"),
    [({}, False), ({"cutoffs": [5]}, True), ({"div_val": 2}, True), ({"embedding_size": 4}, True)],
)
def test_what_makes_a_model_adaptive(settings, is_adaptive):
    assert small_config(**settings).is_adaptive == is_adaptive


@pytest.mark.parametrize(
    "name", ["dropout", "attention_dropout", "layer_norm_epsilon", "initializer_range", "init_range", "proj_init_std"]
)
def test_whole_number_in_json_is_a_float(name):
    value = 0 if "dropout" in name else 1
    assert getattr(small_config(**{name: value}), name) == value
    assert getattr(TransformerXLConfig.from_dict({"memory_init": "empty", name: value}), name) == value


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
        {"torchscript": False, "pruned_heads": {}, "vocab_size_or_config_json_file": 17},
        {"adaptive": True, "tgt_len": 128, "ext_len": 0, "sample_softmax": -1, "attn_type": 0},
        {"eos_token_id": [1, 2]},
    ],
)
def test_settings_of_transformers_and_of_old_files_are_accepted(settings):
    small_config(**settings)


def test_lists_are_copied():
    cutoffs, tie_projs = [5, 11], [False, True, False]
    config, other = small_config(cutoffs=cutoffs, tie_projs=tie_projs), TransformerXLConfig()
    config.cutoffs.append(12)
    config.tie_projs.append(True)
    assert cutoffs == [5, 11]
    assert tie_projs == [False, True, False]
    other.cutoffs.append(5)
    assert TransformerXLConfig().cutoffs == []


def test_original_config_of_wt103_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WT103))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, TransformerXLConfig)
    assert {name: getattr(config, name) for name in WT103_FIELDS} == WT103_FIELDS


def test_keys_that_an_old_config_lacks_have_the_old_defaults():
    config = TransformerXLConfig.from_dict({"model_type": "transfo-xl"})
    assert {name: getattr(config, name) for name in WT103_FIELDS} == WT103_FIELDS


def test_old_config_starts_from_zeros_and_ours_keeps_what_it_says(tmp_path):
    for memory_init in ("empty", "zeros"):
        small_config(memory_init=memory_init, cutoffs=[5], div_val=2).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["memory_init"] == memory_init
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert loaded.memory_init == memory_init
        assert loaded.to_diff_dict() == small_config(memory_init=memory_init, cutoffs=[5], div_val=2).to_diff_dict()
    old = TransformerXLConfig.from_dict({"model_type": "transfo-xl", "n_token": 100, "cutoffs": []})
    assert old.memory_init == "zeros"
    old.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == old.to_diff_dict()


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id", "eos_token_id"])
def test_minus_one_of_old_files_means_no_token(name):
    assert getattr(TransformerXLConfig.from_dict({"model_type": "transfo-xl", name: -1}), name) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attn_type": 2}, r"attn_type=2 \(Vaswani"),
        ({"n_layer": 2, "num_hidden_layers": 4}, "num_hidden_layers.*n_layer.*disagree|n_layer.*num_hidden_layers"),
        ({"d_model": 1023}, "hidden_size=1023 is odd"),
        ({"n_token": 100}, "cutoffs="),
        ({"memory_init": "empty", "mem_len": -4}, "mem_len=-4"),
    ],
)
def test_illegal_file_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transfo-xl"} | content))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_old_file_may_say_the_same_twice():
    config = TransformerXLConfig.from_dict({"model_type": "transfo-xl", "n_token": 300000, "vocab_size": 300000})
    assert config.vocab_size == 300000


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"mem_len": 3}, {"mem_len": 3}),
        ({"n_layer": 5}, {"num_hidden_layers": 5}),
        ({"memory_init": "zeros"}, {"memory_init": "zeros"}),
        ({"num_labels": 7}, {"num_labels": 7}),
    ],
)
def test_override_at_loading_counts(override, expected, tmp_path):
    small_config().save_pretrained(tmp_path)
    for config in (
        AutoConfig.from_pretrained(tmp_path, **override),
        TransformerXLConfig.from_pretrained(tmp_path, **override),
    ):
        assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"mem_len": -1}, "mem_len=-1"),
        ({"hidden_size": 9}, "hidden_size=9"),
        ({"d_model": 9}, "hidden_size=9"),
        ({"memory_init": "none"}, "memory_init='none'"),
        ({"attn_type": 2}, "attn_type=2"),
        ({"cutoffs": [50]}, r"cutoffs=\[50\]"),
    ],
)
def test_illegal_override_at_loading_is_refused(override, message, tmp_path):
    small_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize("name", ["mem_len", "num_hidden_layers", "head_dim"])
def test_illegal_value_set_later_is_refused_when_a_model_is_built_or_the_config_saved(name, tmp_path):
    config = small_config()
    setattr(config, name, -1)
    with pytest.raises(ValueError, match=f"{name}=-1"):
        TransformerXLForCausalLM(config)
    with pytest.raises(ValueError, match=f"{name}=-1"):
        AutoModelForCausalLM.from_config(config)
    with pytest.raises((StrictDataclassError, ValueError), match=f"{name}=-1"):
        config.save_pretrained(tmp_path)


def test_wrong_type_set_later_is_refused():
    config = small_config()
    with pytest.raises(StrictDataclassError, match="mem_len"):
        config.mem_len = "3"


def test_config_can_be_copied_and_pickled():
    config = small_config(cutoffs=[5, 11], div_val=2, id2label={0: "a", 1: "b"})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is TransformerXLConfig
        assert other.to_dict() == config.to_dict()
        assert other.n_layer == 2
    other.cutoffs.append(12)
    assert config.cutoffs == [5, 11]
    assert TransformerXLConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
