"""Saving and loading: bit for bit, each shared weight once, and between bodies and heads."""

import json
import logging
import pickle

import accelerate
import pytest
import torch
from models.evolved_transformer.small_models import EXACT, STRUCTURES, pair_model, random_ids, small_model
from models.evolved_transformer.whole_models import STACKS
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from hf_efficient import (
    EvolvedTransformerEncoderModel,
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerModel,
)

VARIANTS = {
    **STRUCTURES,
    "untied": {"tie_word_embeddings": False},
    "input_bias": {"encoder_input_bias": True},
    "unequal": {"num_encoder_layers": 1, "num_decoder_layers": 3},
}


def load(cls, folder, **settings):
    """Load, and make sure that nothing was missing or left over."""
    loaded, info = cls.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return loaded


def assert_equal_models(given, expected):
    given, expected = dict(given.named_parameters()), dict(expected.named_parameters())
    assert given.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(given[name], parameter), name


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_model_loads_bit_for_bit(name, tmp_path, capfd):
    ids = random_ids(2, 7)
    models = {pair_model: AutoModelForSeq2SeqLM}
    if name != "input_bias":
        models[small_model] = AutoModelForCausalLM
    for build, auto_class in models.items():
        model, folder = build(**VARIANTS[name]), tmp_path / auto_class.__name__
        model.save_pretrained(folder)
        saved = {path.name for path in folder.iterdir()} - {"generation_config.json"}
        assert saved == {"config.json", "model.safetensors"}
        capfd.readouterr()
        for cls in (auto_class, type(model)):
            loaded = load(cls, folder, dtype=torch.float64)
            assert type(loaded) is type(model)
            assert_equal_models(loaded, model)
            torch.testing.assert_close(loaded(ids, labels=ids).loss, model(ids, labels=ids).loss, **EXACT)
        assert "[transformers]" not in capfd.readouterr().err


def test_every_weight_is_saved_once_under_its_name(tmp_path):
    model = pair_model(num_encoder_layers=1, num_decoder_layers=1)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {name for name, _ in model.named_parameters()}
    encoder = ["glu_norm", "glu.value_proj", "glu.gate_proj", "branch_norm", "branches.dense", "branches.convolution"]
    encoder += ["branches.norm", "branches.separable.depthwise", "branches.separable.pointwise"]
    encoder += ["self_attention_norm", "feed_forward_norm", "feed_forward.up_proj", "feed_forward.down_proj"]
    encoder += [f"self_attention.{part}_proj" for part in "qkvo"]
    decoder = ["wide_attention_norm", "branch_norm", "branches.norm", "self_attention_norm", "cross_attention_norm"]
    decoder += ["feed_forward_norm", "feed_forward.norm", "feed_forward.up_proj", "feed_forward.down_proj"]
    for kind in ("separable_11", "separable_7", "separable_out"):
        decoder += [f"branches.{kind}.{part}" for part in ("depthwise", "pointwise")]
    for kind in ("wide_self_attention", "wide_cross_attention", "self_attention", "cross_attention"):
        decoder += [f"{kind}.{part}_proj" for part in "qkvo"]
    expected = {"model.embed_tokens", "model.encoder.final_norm", "model.decoder.final_norm"}
    expected |= {f"model.encoder.layers.0.{part}" for part in encoder}
    expected |= {f"model.decoder.layers.0.{part}" for part in decoder}
    assert {name.rsplit(".", 1)[0] for name in names} == expected


def test_body_and_heads_exchange_checkpoints(tmp_path):
    model = pair_model()
    model.save_pretrained(tmp_path / "head")
    body = load(AutoModel, tmp_path / "head", dtype=torch.float64)
    assert type(body) is EvolvedTransformerModel
    assert_equal_models(body, model.model)
    body.save_pretrained(tmp_path / "body")
    names = {name.removeprefix("model.") for name in load_file(tmp_path / "head" / "model.safetensors")}
    assert set(load_file(tmp_path / "body" / "model.safetensors")) == names
    assert_equal_models(load(AutoModelForSeq2SeqLM, tmp_path / "body", dtype=torch.float64), model)


def test_encoder_can_be_taken_out(tmp_path):
    model, ids = pair_model(), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    encoder, info = AutoModelForTextEncoding.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert type(encoder) is EvolvedTransformerEncoderModel
    assert not info["missing_keys"]
    assert info["unexpected_keys"]
    assert all("decoder" in name for name in info["unexpected_keys"])
    expected = model.get_encoder()(ids).last_hidden_state
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected, **EXACT)
    encoder.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert (config["is_encoder_decoder"], config["is_decoder"]) == (False, False)
    again = load(AutoModel, tmp_path / "encoder", dtype=torch.float64)
    assert again.decoder is None
    torch.testing.assert_close(again(ids).last_hidden_state, expected, **EXACT)


def test_a_checkpoint_of_a_causal_model_is_one(tmp_path):
    """Whatever the configuration that the head was built with said."""
    model = small_model(EvolvedTransformerForCausalLM, **STACKS["both"])
    model.save_pretrained(tmp_path)
    body = load(AutoModel, tmp_path, dtype=torch.float64)
    assert body.encoder is None
    assert_equal_models(body, model.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_or_changed_on_request(dtype, tmp_path):
    model = small_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert loaded.dtype == dtype
    assert_equal_models(loaded, model)
    assert load(AutoModelForCausalLM, tmp_path, dtype=torch.float32).dtype == torch.float32


def test_model_loads_in_shards_and_onto_a_device_map(tmp_path):
    model = pair_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for device_map in ("cpu", {"": "cpu"}, None):
        assert_equal_models(load(AutoModelForSeq2SeqLM, tmp_path, device_map=device_map, dtype=torch.float64), model)


def test_blocks_are_not_split_between_devices():
    """Whatever the device map, a block's residual sums stay on one device."""
    model = pair_model()
    whole = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": 40_000, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert len(set(whole.values())) == 2
    assert not any(".layers." in name and not name.rsplit(".", 1)[-1].isdigit() for name in whole)


@torch.no_grad()
def test_model_without_storage_can_be_built_and_filled():
    model, ids = pair_model(encoder_input_bias=True), random_ids(2, 5)
    with torch.device("meta"):
        empty = EvolvedTransformerForConditionalGeneration(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not list(empty.named_buffers())
    filled = empty.to_empty(device="cpu").to(torch.float64).eval()
    filled.load_state_dict(model.state_dict())
    filled.tie_weights()
    torch.testing.assert_close(filled(ids, labels=ids).loss, model(ids, labels=ids).loss, **EXACT)


@torch.no_grad()
def test_offloaded_parameters_come_back_for_each_call():
    model, ids = pair_model(encoder_input_bias=True), random_ids(2, 6)
    expected, sequence = model(ids, labels=ids), model.generate(ids, max_new_tokens=4, do_sample=False)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), sequence)


@pytest.mark.parametrize(
    "missing", ["model.decoder.layers.0.branches.separable_11.depthwise.weight", "model.embed_tokens.weight"]
)
def test_missing_tensor_is_reported_and_initialised(missing, tmp_path):
    small_model(dtype=torch.float32, tie_word_embeddings=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if name != missing:
            assert torch.equal(parameter, tensors[name]), name


def test_config_file_names_every_setting(tmp_path, caplog):
    model = small_model()
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["EvolvedTransformerForCausalLM"]
    assert set(type(model.config).__annotations__) <= set(written)
    assert (written["is_decoder"], written["is_encoder_decoder"]) == (True, False)
    assert caplog.text == ""


def test_model_can_be_pickled():
    model, ids = pair_model(), random_ids(2, 4)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is EvolvedTransformerForConditionalGeneration
    torch.testing.assert_close(twin(ids, labels=ids).loss, model(ids, labels=ids).loss, rtol=0, atol=0)
