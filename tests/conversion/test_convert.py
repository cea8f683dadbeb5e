"""`convert_checkpoint`: what it reads, writes and compares; nothing is written when anything is wrong."""

import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from golden_utils import FIXTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_efficient import (
    TransformerXLConfig,
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLForTokenClassification,
    TransformerXLModel,
)
from hf_efficient.conversion import convert_checkpoint
from hf_efficient.conversion.verify import verify_conversion

ORIGINAL = FIXTURES / "kimiyoung_xl" / "plain" / "model.pt"
WORDS = [f"word{index}" for index in range(28)] + ["<eos>", "<unk>"]

# A config.json of transformers 4, without the defaults.
LEGACY_CONFIG = {
    "model_type": "transfo-xl",
    "architectures": ["TransfoXLLMHeadModel"],
    "vocab_size": len(WORDS),
    "d_model": 16,
    "d_embed": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 24,
    "n_layer": 2,
    "mem_len": 5,
    "clamp_len": 3,
    "cutoffs": [10, 20],
    "div_val": 2,
    "tie_projs": [False, True, True],
    "same_length": True,
    "untie_r": True,
    "eos_token_id": 0,
    "adaptive": True,
    "proj_share_all_but_first": True,
}
CLASSES = {
    "TransfoXLModel": TransformerXLModel,
    "TransfoXLLMHeadModel": TransformerXLForCausalLM,
    "TransfoXLForSequenceClassification": TransformerXLForSequenceClassification,
    "TransformerXLForTokenClassification": TransformerXLForTokenClassification,
}


def make_legacy(folder: Path, is_safetensors: bool = False, **changes) -> torch.nn.Module:
    """Write a folder as transformers 4 did, and return the model in it."""
    values = {**LEGACY_CONFIG, **changes}
    name = (values["architectures"] or ["TransfoXLLMHeadModel"])[0]
    model = CLASSES[name](TransformerXLConfig.from_dict(values)).eval()
    for index, weight in enumerate(model.parameters()):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if not is_safetensors:
        weights = load_file(folder / "model.safetensors")
        weights["transformer.pos_emb.inv_freq"] = torch.zeros(8)
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return model


def edit_weights(folder: Path, edit) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    edit(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def write_vocabulary(folder: Path, words=WORDS) -> Path:
    path = folder / "vocab.pkl"
    content = {"sym2idx": {word: index for index, word in enumerate(words)}, "idx2sym": list(words)}
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.fixture
def legacy(tmp_path) -> Path:
    folder = tmp_path / "legacy"
    make_legacy(folder)
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "converted"


# --- what is converted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_safetensors", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_legacy_folder(tmp_path, output, name, is_safetensors):
    model = make_legacy(tmp_path / "legacy", is_safetensors, architectures=[name])
    report = convert_checkpoint(tmp_path / "legacy", output)
    converted = CLASSES[name].from_pretrained(output)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(converted(ids, torch.ones_like(ids))[0], model(ids, torch.ones_like(ids))[0])
    assert (report.release, report.model_class) == ("transformers 4", CLASSES[name].__name__)
    assert report.num_parameters == model.num_parameters()
    assert report.verification.max_output_difference == 0.0
    assert converted.config.memory_init == "zeros"
    assert json.loads((output / "config.json").read_text())["architectures"] == [CLASSES[name].__name__]


def test_legacy_config_without_architectures_is_a_language_model(tmp_path, output):
    make_legacy(tmp_path / "legacy", architectures=None)
    assert convert_checkpoint(tmp_path / "legacy", output).model_class == "TransformerXLForCausalLM"


def test_half_precision_is_kept(legacy, output):
    edit_weights(legacy, lambda weights: weights.update({name: w.half() for name, w in weights.items()}))
    convert_checkpoint(legacy, output)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.float16}


def test_weights_that_repeat_others(legacy, output):
    def repeat(weights):
        for index in range(3):
            weights[f"crit.out_layers.{index}.weight"] = weights[f"transformer.word_emb.emb_layers.{index}.weight"]
        weights["crit.out_projs.1"] = weights["transformer.word_emb.emb_projs.1"]

    edit_weights(legacy, repeat)
    assert "crit.out_projs.1" not in load_file(convert_checkpoint(legacy, output).output / "model.safetensors")


def test_shared_biases_that_are_repeated_in_every_layer(tmp_path, output):
    make_legacy(tmp_path / "legacy", untie_r=False)

    def repeat(weights):
        for layer in range(2):
            for bias in ("r_w_bias", "r_r_bias"):
                weights[f"transformer.layers.{layer}.dec_attn.{bias}"] = weights[f"transformer.{bias}"]

    edit_weights(tmp_path / "legacy", repeat)
    convert_checkpoint(tmp_path / "legacy", output)


def test_generation_settings_are_kept(legacy, output):
    GenerationConfig(max_length=77, eos_token_id=3).save_pretrained(legacy)
    convert_checkpoint(legacy, output)
    found = GenerationConfig.from_pretrained(output)
    assert (found.max_length, found.eos_token_id) == (77, 3)


@pytest.mark.parametrize("is_folder", [False, True])
def test_original_release(tmp_path, output, is_folder):
    source = tmp_path / "run"
    source.mkdir()
    shutil.copy(ORIGINAL, source / "model.pt")
    report = convert_checkpoint(source if is_folder else source / "model.pt", str(output))
    assert type(AutoModelForCausalLM.from_pretrained(output)) is TransformerXLForCausalLM
    assert report.release == "the original PyTorch release"


def test_bare_state_dict_with_a_configuration(tmp_path, output):
    state_dict = ORIGINAL.with_name("state_dict.pt")
    with pytest.raises(ValueError, match="holds weights only"):
        convert_checkpoint(state_dict, output)
    convert_checkpoint(ORIGINAL, tmp_path / "whole")
    convert_checkpoint(state_dict, output, config=tmp_path / "whole" / "config.json")
    convert_checkpoint(state_dict, tmp_path / "third", config=TransformerXLConfig.from_pretrained(output))
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", output, tmp_path / "third")]
    assert all(file.keys() == files[0].keys() for file in files)
    assert all(torch.equal(file[name], files[0][name]) for file in files for name in files[0])


def test_converted_folder_can_be_converted_again(legacy, output, tmp_path):
    convert_checkpoint(legacy, output)
    convert_checkpoint(output, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (output / "config.json").read_text()


# --- vocabulary ---------------------------------------------------------------------------------------------


def test_vocabulary_in_the_folder(legacy, output):
    write_vocabulary(legacy)
    (legacy / "tokenizer_config.json").write_text('{"lower_case": true, "additional_special_tokens": []}')
    report = convert_checkpoint(legacy, output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert report.vocab_size == len(tokenizer) == len(WORDS)
    assert tokenizer("Word5 other")["input_ids"] == [5, WORDS.index("<unk>")]
    assert report.notes == ()


def test_tokens_without_a_row_in_the_embedding_are_named(legacy, output):
    write_vocabulary(legacy)
    assert "<formula>" in str(convert_checkpoint(legacy, output))


def test_vocabulary_elsewhere(tmp_path, legacy, output):
    path = write_vocabulary(tmp_path, WORDS[:-2])
    report = convert_checkpoint(legacy, output, vocabulary=path)
    assert "28 words, fewer than the model's 30" in str(report)
    convert_checkpoint(legacy, tmp_path / "second", vocabulary=tmp_path)
    texts = [(folder / "vocab.json").read_text() for folder in (output, tmp_path / "second")]
    assert texts[0] == texts[1]


class Vocab:
    """The original release's vocabulary."""


class Corpus:
    """The original release's corpus."""


def test_corpus_beside_the_original_release(tmp_path, output):
    corpus, corpus.vocab = Corpus(), Vocab()
    words = ["<eos>", "<unk>"] + [f"w{index}" for index in range(68)]
    corpus.vocab.sym2idx, corpus.vocab.lower_case = {word: index for index, word in enumerate(words)}, True
    corpus.train = torch.arange(100)
    torch.save(corpus, tmp_path / "cache.pt")
    shutil.copy(ORIGINAL, tmp_path / "model.pt")
    convert_checkpoint(tmp_path, output)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert tokenizer("W7 , x")["input_ids"] == [words.index("w7"), 1, 1]
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0


def test_text_vocabulary_of_the_original_release(tmp_path, output):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["<UNK>", "<S>", *(f"w{index}," for index in range(68))]))
    convert_checkpoint(ORIGINAL, output, vocabulary=path)
    assert AutoTokenizer.from_pretrained(output)("w3, w4")["input_ids"] == [5, 0]


def test_no_vocabulary_is_reported(legacy, output):
    report = convert_checkpoint(legacy, output)
    assert report.vocab_size is None
    assert "No vocabulary was found" in str(report)


def test_vocabulary_of_a_larger_model(legacy, output):
    write_vocabulary(legacy, [*WORDS, "one more"])
    assert_refused(legacy, output, "The vocabulary has 31 words and the model 30")


# --- what is refused ----------------------------------------------------------------------------------------


def assert_refused(source: Path, output: Path, reason: str, error=ValueError, **kwargs) -> None:
    """The conversion gives the error, and leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error, match=reason):
        convert_checkpoint(source, output, **kwargs)
    assert sorted(output.parent.iterdir()) == before


def test_output_that_holds_something(legacy, output):
    output.mkdir()
    convert_checkpoint(legacy, output)
    content = {path: path.read_bytes() for path in output.iterdir()}
    assert_refused(legacy, output, "is not empty; give a new or an empty folder")
    assert {path: path.read_bytes() for path in output.iterdir()} == content
    assert_refused(legacy, legacy, "is not empty")
    assert_refused(legacy, legacy / "config.json", "is not empty")


def test_missing_sources(tmp_path, legacy, output):
    assert_refused(tmp_path / "nothing", output, "there is no .*nothing; give a checkpoint's", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", output, "neither config.json .* nor model.pt", FileNotFoundError)
    assert_refused(legacy, output, "holds no vocabulary", FileNotFoundError, vocabulary=tmp_path)
    (legacy / "pytorch_model.bin").unlink()
    assert_refused(legacy, output, "holds no weights; it needs model.safetensors or", FileNotFoundError)
    missing = tmp_path / "config.json"
    state_dict = ORIGINAL.with_name("state_dict.pt")
    assert_refused(state_dict, output, f"there is no {missing}", FileNotFoundError, config=missing)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
def test_truncated_weights(tmp_path, output, name):
    source = tmp_path / "source"
    make_legacy(source, is_safetensors=name.endswith("safetensors"))
    if name == "model.pt":
        shutil.rmtree(source)
        source.mkdir()
        shutil.copy(ORIGINAL, source / name)
    content = (source / name).read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (source / name).write_bytes(content[:length])
        assert_refused(source, output, re.escape(str(source / name)))


@pytest.mark.slow
def test_changed_bits_convert_or_are_refused(tmp_path, output):
    """In the container without checksums; anything but a ValueError fails."""
    content = ORIGINAL.with_name("model_legacy_container.pt").read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[generator.randrange(15_000)] ^= 1 << generator.randrange(8)
        (tmp_path / "model.pt").write_bytes(damaged)
        try:
            convert_checkpoint(tmp_path / "model.pt", output)
            shutil.rmtree(output)
        except ValueError:
            refused += 1
    assert 100 < refused < 500


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is no configuration"),
        ("[]", "is no configuration"),
        ("{}", "is no configuration"),
        ('{"model_type": "bert"}', "has model_type='bert'; only 'transfo-xl'"),
        (json.dumps({**LEGACY_CONFIG, "architectures": ["GPT2Model"]}), "holds a 'GPT2Model'; only TransfoXLModel"),
        (json.dumps({**LEGACY_CONFIG, "attn_type": 2}), r"attn_type=2 \(Vaswani"),
        (json.dumps({**LEGACY_CONFIG, "n_layer": "two"}), "config.json: .*num_hidden_layers"),
        (json.dumps({**LEGACY_CONFIG, "n_layer": 10**9}), "has 2 layers, and .*num_hidden_layers=1000000000"),
        (json.dumps({**LEGACY_CONFIG, "d_inner": 10**9}), r"has shape .*24.* asks for .*1000000000"),
    ],
)
def test_configurations_that_cannot_be_used(legacy, output, content, reason):
    (legacy / "config.json").write_text(content)
    assert_refused(legacy, output, reason)


FIRST = "transformer.layers.0.dec_attn.o_net.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda weights: weights.pop(FIRST), "missing_keys.*layers.0.self_attn.o_proj"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected_keys.*extra"),
        (
            lambda weights: weights.update({FIRST: torch.zeros(2, 2)}),
            r"o_proj.weight has shape \[2, 2\], and .* asks for \[16, 16\]",
        ),
        (lambda weights: weights.update({FIRST: torch.zeros(16, 16).half()}), "2 floating-point types"),
        (lambda weights: weights.update(step=3), "something beside tensors"),
        (
            lambda weights: weights.update({"crit.out_projs.1": torch.ones(16, 8)}),
            "crit.out_projs.1 differs from word_emb.emb_projs.1",
        ),
        (
            lambda weights: weights.update({"crit.out_layers.0.weight": torch.ones(10, 16)}),
            "crit.out_layers.0.weight differs from word_emb.emb_layers.0.weight.*tie_word_embeddings",
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration(legacy, output, edit, reason):
    edit_weights(legacy, edit)
    assert_refused(legacy, output, reason)


def test_configuration_for_a_source_that_has_one(legacy, output):
    assert_refused(legacy, output, "has a config.json of its own", config=TransformerXLConfig())
    assert_refused(ORIGINAL, output, "its own hyper-parameters", config=TransformerXLConfig())


# --- verification -------------------------------------------------------------------------------------------


def test_written_weights_that_differ(legacy, output):
    convert_checkpoint(legacy, output)
    model = AutoModelForCausalLM.from_pretrained(output)
    source = load_file(output / "model.safetensors")
    assert verify_conversion(model, source, output).num_tensors == len(source)
    written = {**source, FIRST: source[FIRST].clone()}
    written[FIRST][3, 5] += 1e-6
    save_file(written, output / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="layers.0.dec_attn.o_net.weight of the source is not what was written"):
        verify_conversion(model, source, output)
    with pytest.raises(ValueError, match="gives other outputs"):
        verify_conversion(model, written, output)
    with pytest.raises(ValueError, match="extra of the source is not what was written"):
        verify_conversion(model, {**written, "extra": torch.ones(1)}, output)
    del source[FIRST]
    with pytest.raises(ValueError, match="The source lacks layers.0.dec_attn.o_net.weight"):
        verify_conversion(model, source, output)


def test_base_model_loads_from_a_language_model(legacy, output):
    convert_checkpoint(legacy, output)
    assert type(AutoModel.from_pretrained(output)) is TransformerXLModel
