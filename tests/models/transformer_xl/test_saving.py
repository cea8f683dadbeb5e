"""Saving and loading: bit for bit, under the names of transformers 4 on disk, and nothing broken is let in."""

import copy
import json
import logging

import pytest
import torch
from models.transformer_xl.small_models import EXACT, VARIANTS, random_ids, small_config, small_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_efficient import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLForTokenClassification,
    TransformerXLModel,
)

AUTO_CLASSES = {
    TransformerXLModel: AutoModel,
    TransformerXLForCausalLM: AutoModelForCausalLM,
    TransformerXLForSequenceClassification: AutoModelForSequenceClassification,
    TransformerXLForTokenClassification: AutoModelForTokenClassification,
}
HEADS = {
    TransformerXLModel: set(),
    TransformerXLForSequenceClassification: {"score.weight"},
    TransformerXLForTokenClassification: {"score.weight", "score.bias"},
}
CLASSES = {cls.__name__.removeprefix("TransformerXL"): cls for cls in AUTO_CLASSES}
SAVED_VARIANTS = {
    name: VARIANTS[name]
    for name in (
        "plain",
        "shared_biases",
        "untied_words",
        "narrow_embedding",
        "adaptive",
        "adaptive_narrow",
        "adaptive_shrinking",
        "adaptive_untied",
        "everything",
    )
}


def names_on_disk(config, cls):
    """The keys of transformers 4, without what is tied to another key and the table that is computed."""
    body = "" if cls is TransformerXLModel else "transformer."
    num_bins = len(config.cutoffs) + 1
    projects = config.div_val > 1 or config.embedding_size != config.hidden_size
    tables = range(1) if config.div_val == 1 else range(num_bins)
    names = {f"{body}word_emb.emb_layers.{i}.weight" for i in tables}
    if projects:
        names |= {f"{body}word_emb.emb_projs.{i}" for i in tables}
    for index in range(config.num_hidden_layers):
        layer = f"{body}layers.{index}."
        names |= {f"{layer}dec_attn.{name}.weight" for name in ("qkv_net", "o_net", "r_net", "layer_norm")}
        names |= {f"{layer}dec_attn.layer_norm.bias", f"{layer}pos_ff.layer_norm.bias"}
        names |= {f"{layer}pos_ff.CoreNet.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
        names.add(f"{layer}pos_ff.layer_norm.weight")
        if config.untie_r:
            names |= {f"{layer}dec_attn.r_w_bias", f"{layer}dec_attn.r_r_bias"}
    if not config.untie_r:
        names |= {f"{body}r_w_bias", f"{body}r_r_bias"}
    if cls is not TransformerXLForCausalLM:
        return names | HEADS[cls]
    names |= {f"crit.out_layers.{i}.bias" for i in tables}
    if not config.tie_word_embeddings:
        names |= {f"crit.out_layers.{i}.weight" for i in tables}
    if projects:
        names |= {f"crit.out_projs.{i}" for i in range(num_bins) if not config.tie_projs[i]}
    if config.cutoffs:
        names |= {"crit.cluster_weight", "crit.cluster_bias"}
    return names


def legacy_state_dict(model):
    """What transformers 4 wrote with `torch.save`: tied tensors under each of their names, and the frequencies."""
    config, state = model.config, {}
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            state[name] = tensor
    state = {legacy_name(name): tensor for name, tensor in state.items()}
    for index, layer in enumerate(model.model.layers):
        attention, prefix = layer.self_attn, f"transformer.layers.{index}.dec_attn."
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        state[prefix + "qkv_net.weight"] = torch.cat(parts).detach()
        if not config.untie_r:
            state[prefix + "r_w_bias"], state[prefix + "r_r_bias"] = (
                model.model.content_bias.detach(),
                model.model.position_bias.detach(),
            )
    for i in range(len(config.cutoffs) + 1):
        shared = f"transformer.word_emb.emb_projs.{0 if config.div_val == 1 else i}"
        if config.tie_projs[i] and shared in state:
            state[f"crit.out_projs.{i}"] = state[shared]
    frequencies = 1 / 10000 ** (torch.arange(0, config.hidden_size, 2) / config.hidden_size)
    state["transformer.pos_emb.inv_freq"] = frequencies
    return state


def legacy_name(name):
    """One name in the model to the one on disk, spelt out here a second time."""
    for old, new in [
        ("model.", "transformer."),
        ("self_attn.", "dec_attn."),
        ("o_proj.", "o_net."),
        ("r_proj.", "r_net."),
        ("content_bias", "r_w_bias"),
        ("position_bias", "r_r_bias"),
        ("feed_forward.", "pos_ff."),
        ("up_proj.", "CoreNet.0."),
        ("down_proj.", "CoreNet.3."),
        ("embed_tokens.tails.", "word_emb.emb_layers."),
        ("embed_tokens.projections.", "word_emb.emb_projs."),
        ("embed_tokens.", "word_emb.emb_layers.0."),
        ("lm_head.tails.", "crit.out_layers."),
        ("lm_head.projections.", "crit.out_projs."),
        ("lm_head.cluster_", "crit.cluster_"),
        ("lm_head.", "crit.out_layers.0."),
    ]:
        name = name.replace(old, new)
    return name


def assert_equal_models(loaded, model):
    """Every parameter bit for bit, and the ties."""
    expected = dict(model.named_parameters(remove_duplicate=False))
    given = dict(loaded.named_parameters(remove_duplicate=False))
    assert given.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(given[name], parameter), name
        assert given[name].dtype == parameter.dtype
        assert given[name].device.type == "cpu"
    assert len(list(loaded.parameters())) == len(list(model.parameters())), "ties"
    assert not dict(loaded.named_buffers())


def load(cls, folder, **settings):
    """Load, and make sure that nothing was missing or left over."""
    loaded, info = cls.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return loaded


@pytest.mark.parametrize("variant", SAVED_VARIANTS)
@pytest.mark.parametrize("name", CLASSES)
def test_saved_model_loads_bit_for_bit_under_legacy_names(name, variant, tmp_path, capfd):
    cls = CLASSES[name]
    model = small_model(cls, **SAVED_VARIANTS[variant])
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files - {"generation_config.json"} == {"config.json", "model.safetensors"}
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == names_on_disk(model.config, cls)
    capfd.readouterr()
    for loader in (cls, AUTO_CLASSES[cls]):
        loaded = load(loader, tmp_path, dtype=torch.float64)
        assert type(loaded) is cls
        assert not loaded.training
        assert_equal_models(loaded, model)
        ids = random_ids(1, 5)
        torch.testing.assert_close(loaded(ids)[0], model(ids)[0], **EXACT)  # weights lie elsewhere in memory
    assert capfd.readouterr().err.count("[transformers]") == 0


def test_fused_matrix_holds_queries_keys_and_values_in_this_order(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    fused = load_file(tmp_path / "model.safetensors")["transformer.layers.1.dec_attn.qkv_net.weight"]
    attention = model.model.layers[1].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(fused, expected)


@pytest.mark.parametrize("variant", SAVED_VARIANTS)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_checkpoint_of_transformers_4_loads(kind, variant, tmp_path, caplog):
    model = small_model(memory_init="zeros", **{k: v for k, v in VARIANTS[variant].items() if k != "memory_init"})
    state = legacy_state_dict(model)
    if kind == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        state = {name: tensor.clone() for name, tensor in state.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    del config["memory_init"]  # its absence tells a legacy file
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        loaded = load(AutoModelForCausalLM, tmp_path, dtype=torch.float64)
    assert_equal_models(loaded, model)
    torch.testing.assert_close(loaded(random_ids(2, 5)).logits, model(random_ids(2, 5)).logits, **EXACT)
    assert caplog.text == ""


@pytest.mark.parametrize("variant", ["plain", "shared_biases", "adaptive_shrinking", "everything"])
def test_body_and_heads_share_checkpoints(variant, tmp_path):
    """Whichever class saved and whichever loads: the body is there, and of the head what both have."""

    def head_names(model):
        if isinstance(model, TransformerXLModel):
            return set()
        return {name for name, _ in model.named_parameters() if not name.startswith("model.")}

    for cls in CLASSES.values():
        model = small_model(cls, **SAVED_VARIANTS[variant])
        model.save_pretrained(tmp_path / cls.__name__)
        for other in CLASSES.values():
            loaded, info = other.from_pretrained(
                tmp_path / cls.__name__, output_loading_info=True, dtype=torch.float64
            )
            assert set(info["missing_keys"]) == head_names(loaded) - head_names(model)
            bodies = [one if isinstance(one, TransformerXLModel) else one.model for one in (loaded, model)]
            assert_equal_models(*bodies)
            assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_tied_tables_stay_tied_after_loading_and_copying(tmp_path):
    model = small_model(**SAVED_VARIANTS["adaptive_shrinking"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (loaded, copy.deepcopy(model), copy.deepcopy(loaded)):
        assert one.lm_head.weight is one.model.embed_tokens.weight
        assert one.lm_head.tails["2"].weight is one.model.embed_tokens.tails["2"].weight
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.embed_tokens.weight.add_(1)
    assert not torch.equal(copied.lm_head.weight, model.lm_head.weight)


def test_untied_checkpoint_with_equal_tables_stays_untied(tmp_path):
    model = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_sharded_checkpoint_loads(variant, tmp_path):
    model = small_model(**SAVED_VARIANTS[variant])
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_models(load(AutoModelForCausalLM, tmp_path, dtype=torch.float64), model)


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_names_of_the_model_load_too(variant, tmp_path):
    model = small_model(**SAVED_VARIANTS[variant])
    model.save_pretrained(tmp_path, save_original_format=False)
    assert not any("dec_attn" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_equal_models(load(AutoModelForCausalLM, tmp_path, dtype=torch.float64), model)


def test_resaved_legacy_checkpoint_has_the_same_names_and_bits(tmp_path):
    model = small_model(**SAVED_VARIANTS["everything"])
    model.save_pretrained(tmp_path / "one")
    load(AutoModelForCausalLM, tmp_path / "one", dtype=torch.float64).save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("variant", ["plain", "shared_biases", "everything"])
def test_load_state_dict_takes_names_on_disk_and_in_the_model(variant, tmp_path):
    model, other = small_model(**SAVED_VARIANTS[variant]), small_model(seed=9, **SAVED_VARIANTS[variant])
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    result = other.load_state_dict(on_disk, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("lm_head.") and name.endswith("weight") for name in result.missing_keys)
    assert_equal_models(other, model)
    other = small_model(seed=9, **SAVED_VARIANTS[variant])
    other.load_state_dict(model.state_dict())
    assert_equal_models(other, model)
    with pytest.raises(RuntimeError, match="nonsense"):
        other.load_state_dict(model.state_dict() | {"nonsense": torch.ones(1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_or_changed_on_request(dtype, tmp_path):
    model = small_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert loaded.dtype == dtype
    assert_equal_models(loaded, model)
    assert load(AutoModelForCausalLM, tmp_path, dtype=torch.float32).dtype == torch.float32


def test_model_loads_onto_a_device_map(tmp_path):
    model = small_model(**SAVED_VARIANTS["everything"])
    model.save_pretrained(tmp_path)
    for device_map in ("cpu", {"": "cpu"}):
        loaded = load(AutoModelForCausalLM, tmp_path, device_map=device_map, dtype=torch.float64)
        torch.testing.assert_close(loaded(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits, **EXACT)


def test_settings_can_be_overridden_when_a_model_is_loaded(tmp_path):
    small_model().save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path, mem_len=3, same_length=True, attn_implementation="eager")
    assert (loaded.config.mem_len, loaded.config.same_length) == (3, True)
    assert loaded.config._attn_implementation == "eager"
    assert loaded.create_cache().mem_len == 3
    with pytest.raises(ValueError, match="mem_len=-3"):
        AutoModelForCausalLM.from_pretrained(tmp_path, mem_len=-3)


def break_file(folder, how):
    """Damage a saved model."""
    path = folder / "model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "header":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "shape":
        tensors["transformer.layers.0.dec_attn.r_net.weight"] = torch.zeros(3, 3)
        save_file(tensors, path, metadata={"format": "pt"})
    elif how == "fused_shape":
        tensors["transformer.layers.0.dec_attn.qkv_net.weight"] = torch.zeros(25, 8)
        save_file(tensors, path, metadata={"format": "pt"})
    elif how == "absent":
        path.unlink()
    elif how == "config":
        (folder / "config.json").write_text("{")
    elif how == "other_sizes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "incomplete metadata"),
        ("header", "header too large"),
        ("empty", "header too small"),
        ("shape", "mismatched"),
        ("fused_shape", "mismatched"),
        ("absent", "no file named model.safetensors"),
        ("config", "not a valid JSON file"),
        ("other_sizes", "mismatched"),
    ],
)
def test_damaged_checkpoint_is_refused(how, message, tmp_path):
    small_model().save_pretrained(tmp_path)
    break_file(tmp_path, how)
    with pytest.raises((OSError, RuntimeError, SafetensorError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_tensor_is_reported_and_not_left_uninitialised(tmp_path):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in ("transformer.layers.0.dec_attn.r_w_bias", "transformer.layers.1.dec_attn.qkv_net.weight"):
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = {f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"}
    assert set(info["missing_keys"]) == {"model.layers.0.self_attn.content_bias", *missing}
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert 0 < weight.std() < 3 * model.config.initializer_range


def test_pickle_with_code_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "was_run",))

    small_config().save_pretrained(tmp_path)
    torch.save({"transformer.r_w_bias": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights_only|unpickl|unsupported"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "was_run").exists()
