"""The legacy tokenizers of the golden cases, converted, saved and loaded with AutoTokenizer, give the legacy ids."""

import json
import shutil
from pathlib import Path

import pytest
from golden_utils import golden_cases, golden_family
from transformers import AutoTokenizer

from hf_efficient import TransformerXLConfig
from hf_efficient.conversion.legacy_vocabulary import VOCABULARY_FILES, load_legacy_tokenizer

FAMILY = "hf_transfoxl_tokenizer"
VOCABULARIES = [
    pytest.param((folder, name), id=f"{folder.name}/{name}")
    for folder in golden_cases(FAMILY)
    for name in VOCABULARY_FILES
    if (folder / name).is_file()
]


def expected_of(folder: Path) -> dict:
    """The reference's answers for a folder: those of the longest name in expected.json that its own begins with."""
    answers = json.loads((golden_family(FAMILY) / "expected.json").read_text("utf-8"))
    names = [name for name in answers if f"{name}_vocab" in answers and folder.name.startswith(name)]
    name = max(names, key=len)
    parts = ("vocab", "special_ids", "add_eos", "len")
    return {"sentences": answers[name], **{part: answers[f"{name}_{part}"] for part in parts}}


def test_there_are_cases():
    """An empty golden folder would make every test below pass."""
    assert VOCABULARIES


@pytest.fixture(params=VOCABULARIES)
def case(request, tmp_path):
    """Folder that AutoTokenizer loads, made from one vocabulary file of a golden folder, and the answers for it."""
    folder, name = request.param
    legacy, converted = tmp_path / "legacy", tmp_path / "converted"
    shutil.copytree(folder, legacy)
    for other in VOCABULARY_FILES:
        if other != name:
            (legacy / other).unlink(missing_ok=True)
    load_legacy_tokenizer(legacy).save_pretrained(converted)
    TransformerXLConfig().save_pretrained(converted)
    return converted, expected_of(folder)


def test_sentences(case):
    folder, expected = case
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for sentence in expected["sentences"]:
        assert tokenizer.tokenize(sentence["text"]) == sentence["tokens"]
        assert tokenizer(sentence["text"])["input_ids"] == sentence["ids"]
        assert tokenizer.decode(sentence["ids"]) == sentence["decoded"]
        assert tokenizer.decode(sentence["ids"], skip_special_tokens=True) == sentence["decoded_skip"]


def test_vocabulary(case):
    folder, expected = case
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == expected["len"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == expected["vocab"]
    assert dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) == expected["special_ids"]


def test_appended_eos(case):
    folder, expected = case
    tokenizer = AutoTokenizer.from_pretrained(folder, add_eos=True)
    for sentence in expected["add_eos"]:
        assert tokenizer(sentence["text"])["input_ids"] == sentence["ids"]
