"""Vocabulary files of all earlier releases become the tokenizer they meant; what is not plain data is refused."""

import collections
import json
import os
import pickle
import re

import pytest
import torch

from hf_efficient.conversion.legacy_vocabulary import find_vocabulary, load_legacy_tokenizer, read_vocabulary

WORDS = ["<eos>", "the", "cat", "<unk>", "<formula>"]


def hub_dict(words=WORDS, **changes) -> dict:
    """A vocab.pkl's content as on the Hub."""
    return {
        "counter": collections.Counter(words),
        "special": ["<eos>"],
        "lower_case": False,
        "delimiter": None,
        "idx2sym": list(words),
        "sym2idx": collections.OrderedDict((word, index) for index, word in enumerate(words)),
        **changes,
    }


def write_pickle(folder, content, name="vocab.pkl"):
    path = folder / name
    path.write_bytes(pickle.dumps(content))
    return path


def write_settings(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- the releases' files ------------------------------------------------------------------------------------


def test_pickle_of_a_plain_dict(tmp_path):
    write_pickle(tmp_path, hub_dict())
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert tokenizer("the cat dog")["input_ids"] == [1, 2, 3]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == WORDS
    assert tokenizer.splitting == "moses"


def test_whole_tokenizer(tmp_path):
    content = hub_dict(moses_tokenizer=Vocab(lang="en"), pattern=re.compile("a+"), unk_idx=2)
    write_pickle(tmp_path, content)
    assert load_legacy_tokenizer(tmp_path)("dog")["input_ids"] == [2]


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_file(tmp_path, is_zip):
    torch.save(hub_dict(), tmp_path / "vocab.bin", _use_new_zipfile_serialization=is_zip)
    assert load_legacy_tokenizer(tmp_path)("the cat dog")["input_ids"] == [1, 2, 3]


def test_text_file_prefers_its_upper_case_unknown_word(tmp_path):
    (tmp_path / "vocab.txt").write_text("<S> 9\n<unk> 8\n<UNK> 7\nthe 6\nthe 5\n")
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert tokenizer("the dog")["input_ids"] == [3, 2]


def test_vocabulary_without_formula_gets_it_as_transformers_4_did(tmp_path):
    path = write_pickle(tmp_path, hub_dict(WORDS[:-1]))
    assert len(load_legacy_tokenizer(tmp_path)) == len(load_legacy_tokenizer(path)) == len(WORDS)
    write_settings(tmp_path, additional_special_tokens=[])
    assert len(load_legacy_tokenizer(tmp_path)) == len(WORDS) - 1
    write_settings(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<new>"]}')
    assert load_legacy_tokenizer(tmp_path).convert_ids_to_tokens(len(WORDS) - 1) == "<new>"


def test_settings_beside_the_vocabulary(tmp_path):
    write_pickle(tmp_path, hub_dict(lower_case=True))
    assert not load_legacy_tokenizer(tmp_path).lower_case  # the pickle's own setting was never used
    write_settings(tmp_path, lower_case=True, never_split=["a"], special=[], max_size=None, min_freq=0)
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert tokenizer.lower_case
    assert tokenizer.never_split == ["a"]


def test_ids_of_added_tokens_that_contradict_the_vocabulary(tmp_path):
    write_pickle(tmp_path, hub_dict())
    tokens = {
        str(index): {"content": word, "special": True} for index, word in enumerate(["<eos>", "<unk>", "<formula>"])
    }
    write_settings(tmp_path, added_tokens_decoder=tokens, additional_special_tokens=["<formula>"])
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == WORDS


def test_text_file_overrules_a_pickle(tmp_path):
    write_pickle(tmp_path, hub_dict())
    (tmp_path / "vocab.txt").write_text("<unk>\nother\n")
    assert find_vocabulary(tmp_path).name == "vocab.txt"
    assert load_legacy_tokenizer(tmp_path)("other")["input_ids"] == [1]


# --- the original release -----------------------------------------------------------------------------------


class Vocab:
    def __init__(self, **settings):
        self.__dict__.update(settings)


class Corpus(Vocab):
    pass


def save_corpus(folder, is_zip=True, **changes):
    vocabulary = Vocab(**hub_dict(**changes))
    corpus = Corpus(dataset="ptb", vocab=vocabulary, train=torch.arange(9), valid=torch.arange(3))
    torch.save(corpus, folder / "cache.pt", _use_new_zipfile_serialization=is_zip)


@pytest.mark.parametrize("is_zip", [True, False])
def test_corpus(tmp_path, is_zip):
    save_corpus(tmp_path, is_zip, lower_case=True)
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert tokenizer.splitting == "whitespace"
    assert tokenizer.tokenize("The cat. <unk>") == ["the", "cat.", "<unk>"]
    assert (tokenizer.unk_token, tokenizer.eos_token, len(tokenizer)) == ("<unk>", "<eos>", len(WORDS))


def test_corpus_with_the_words_of_lm1b(tmp_path):
    save_corpus(tmp_path, words=["<S>", "<UNK>", "the"], unk_idx=1)
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert (tokenizer.unk_token, tokenizer.eos_token) == ("<UNK>", "<S>")
    assert tokenizer("the dog")["input_ids"] == [2, 1]


def test_corpus_without_special_words(tmp_path):
    save_corpus(tmp_path, words=["32", "104"])
    tokenizer = load_legacy_tokenizer(tmp_path)
    assert (tokenizer.all_special_tokens, len(tokenizer)) == ([], 2)
    assert tokenizer("104 32")["input_ids"] == [1, 0]


def test_text_file_of_lm1b(tmp_path):
    path = tmp_path / "1b_word_vocab.txt"
    path.write_text("<S> 9\n<UNK> 7\nthe 6\ncat. 5\n")
    tokenizer = load_legacy_tokenizer(path, original_release=True)
    assert tokenizer("the cat. dog")["input_ids"] == [2, 3, 1]
    assert (tokenizer.all_special_tokens, len(tokenizer)) == (["<S>", "<UNK>"], 4)


def test_corpus_of_characters(tmp_path):
    save_corpus(tmp_path, words=["a", "b"], delimiter="")
    assert load_legacy_tokenizer(tmp_path)("bab")["input_ids"] == [1, 0, 1]


def test_corpus_with_another_delimiter(tmp_path):
    save_corpus(tmp_path, delimiter="|")
    with pytest.raises(ValueError, match=r"cache.pt splits words at '\|'"):
        load_legacy_tokenizer(tmp_path)


# --- refusals -----------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("place", ["whole file", "vocabulary", "words", "ids", "another field"])
def test_code_never_runs_and_a_vocabulary_made_by_it_is_refused(tmp_path, place):
    target = tmp_path / "made"
    code = Malicious(str(target))
    content = {
        "whole file": code,
        "vocabulary": hub_dict(sym2idx=code),
        "words": hub_dict(sym2idx={code: 0}),
        "ids": hub_dict(sym2idx={"the": code}),
        "another field": hub_dict(counter=code),
    }[place]
    path = write_pickle(tmp_path, content)
    if place == "another field":
        assert load_legacy_tokenizer(path)("the")["input_ids"] == [1]
    else:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_legacy_tokenizer(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # what it would have done elsewhere
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (["the"], "no vocabulary of plain data"),
        ({}, "no vocabulary of plain data"),
        (hub_dict(sym2idx={1: 0}), "no vocabulary of plain data"),
        (hub_dict(sym2idx={"the": 1}, idx2sym=None), "contradicts itself"),
        (hub_dict(sym2idx={"the": 0, "cat": "1"}, idx2sym=None), "contradicts itself"),
        (hub_dict(idx2sym=WORDS[::-1]), "contradicts itself"),
    ],
)
def test_what_is_no_vocabulary(tmp_path, content, reason):
    path = write_pickle(tmp_path, content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_vocabulary(path)
    assert str(path) in str(caught.value)


def test_folder_without_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no vocabulary; it needs one of vocab.txt, vocab.pkl"):
        load_legacy_tokenizer(tmp_path)


def test_broken_settings(tmp_path):
    write_pickle(tmp_path, hub_dict())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is no JSON object"):
        load_legacy_tokenizer(tmp_path)
