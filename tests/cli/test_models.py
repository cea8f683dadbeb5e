"""Models by name and by folder, and memory settings that last only for a block."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_efficient import (
    TransformerXLConfig,
    UniversalTransformerConfig,
    UniversalTransformerForSequenceClassification,
)
from hf_efficient.cli.errors import CommandError
from hf_efficient.cli.models import (
    ARCHITECTURES,
    build_config,
    choose_device,
    load_model,
    memory_settings,
    model_settings,
)


@pytest.fixture(scope="module")
def tokenizer(finished_run):
    return AutoTokenizer.from_pretrained(finished_run)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_setting_is_explained_and_accepted_at_its_default(architecture, tokenizer):
    settings = model_settings(architecture)
    assert all(text for text, _ in settings.values())
    given = {name: default for name, (_, default) in settings.items() if default is not None}
    config = build_config(architecture, given, tokenizer)
    assert config.vocab_size == len(tokenizer)


def test_settings_go_over_starter_settings_and_ids_come_from_the_tokenizer(tokenizer):
    config = build_config("transformer_xl", {"mem_len": 7, "vocab_size": 300}, tokenizer)
    assert (config.mem_len, config.vocab_size, config.hidden_size) == (7, 300, 256)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_legacy_names_win_over_starter_settings(tokenizer):
    config = build_config("transformer_xl", {"d_model": 32, "n_head": 2, "n_layer": 1}, tokenizer)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 2, 1)


def test_memory_settings_last_for_the_block():
    config = TransformerXLConfig(hidden_size=8, num_attention_heads=2, mem_len=4)
    with memory_settings(config, mem_len=9, clamp_len=None, same_length=True):
        assert (config.mem_len, config.clamp_len, config.same_length) == (9, -1, True)
    assert (config.mem_len, config.clamp_len, config.same_length) == (4, -1, False)


@pytest.mark.parametrize("settings", [{"mem_len": -1}, {"mem_len": 0, "same_length": True}, {"mem_len": "long"}])
def test_refused_memory_settings_leave_the_configuration_as_it_was(settings):
    config = TransformerXLConfig(hidden_size=8, num_attention_heads=2, mem_len=4)
    with pytest.raises(CommandError), memory_settings(config, **settings):
        pass
    assert (config.mem_len, config.same_length) == (4, False)


@pytest.mark.parametrize(
    ("architecture", "setting", "mend"),
    [
        ("universal_transformer", {"num_hidden_layers": 4}, "set max_steps and num_layers_in_group"),
        ("universal_transformer", {"num_layers": 4}, "give max_steps"),
        ("evolved_transformer", {"intermediate_size": 512}, "set hidden_size"),
        ("evolved_transformer", {"is_decoder": False}, "leave it out"),
        ("universal_transformer", {"is_decoder": False}, "leave it out"),
    ],
)
def test_setting_of_other_architectures_says_what_it_is_here(tokenizer, architecture, setting, mend):
    with pytest.raises(CommandError, match=mend):
        build_config(architecture, setting, tokenizer)


def test_model_that_writes_no_text_is_not_loaded(tmp_path):
    config = UniversalTransformerConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, is_encoder_decoder=False)
    UniversalTransformerForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CommandError, match="it is a UniversalTransformerForSequenceClassification, .* no text"):
        load_model(str(tmp_path), "cpu")


def test_setting_that_the_architecture_lacks():
    config = TransformerXLConfig(hidden_size=8, num_attention_heads=2)
    with pytest.raises(CommandError, match=r"--num_hashes.*leave it out"), memory_settings(config, num_hashes=2):
        pass


def test_load_model_is_ready_to_evaluate(finished_run):
    model, tokenizer = load_model(str(finished_run), "cpu")
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    with pytest.raises(CommandError, match=r"abacus.*--device cpu"):
        choose_device("abacus")
