"""Pairs from files against the lists they were written from, and their tokens against each text's own."""

import gzip
import json
import logging

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_efficient.data import (
    PairCollator,
    encode_sources,
    load_tokenizer,
    read_pairs,
    read_parallel,
    seq2seq_tokenizer,
    tokenize_pairs,
    train_seq2seq_tokenizer,
    train_tokenizer,
)

ENGLISH = ["A dog runs.", "Two dogs <eos> run.", "The dog sleeps\u2028here."]
GERMAN = ["Ein Hund läuft.", "Zwei Hunde laufen.", "Der Hund schläft hier."]


def write(path, lines: list[str]):
    text = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return Dataset.from_dict({"source": ENGLISH, "target": GERMAN})


@pytest.fixture(scope="module")
def tokenizer(pairs) -> PreTrainedTokenizerFast:
    return train_seq2seq_tokenizer(pairs, 300)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_of_two_files_become_pairs(tmp_path, suffix, caplog):
    source = write(tmp_path / f"text.en{suffix}", [ENGLISH[0] + "\r", "", *ENGLISH[1:], "no translation"])
    target = write(tmp_path / f"text.de{suffix}", [f" {GERMAN[0]}", "keine Quelle", *GERMAN[1:], "\t"])
    with caplog.at_level(logging.WARNING):
        pairs = read_parallel(source, target, cache_dir=tmp_path / "cache")
    assert pairs[:] == {"source": ENGLISH, "target": GERMAN}
    assert "2 of 5 pairs are blank on a side and were dropped" in caplog.text


def test_pairs_of_one_file(tmp_path):
    rows = [{"source": s, "target": t, "id": 1} for s, t in zip(ENGLISH, GERMAN, strict=True)]
    table = write(tmp_path / "pairs.tsv", [f"{row['source']}\t{row['target']}" for row in rows] + ["", "\tnothing"])
    objects = write(tmp_path / "pairs.jsonl.gz", [json.dumps(row) for row in rows])
    for file in (table, objects):
        assert read_pairs(file, cache_dir=tmp_path / "cache")[:] == {"source": ENGLISH, "target": GERMAN}


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Some editors put one in front of a file."""
    files = [write(tmp_path / name, ["\ufeff" + line, "\ufeffkept"]) for name, line in (("en", "dog"), ("de", "Hund"))]
    pairs = read_parallel(*files, cache_dir=tmp_path / "cache")
    assert pairs[:] == {"source": ["dog", "\ufeffkept"], "target": ["Hund", "\ufeffkept"]}
    objects = write(tmp_path / "pairs.jsonl", ["\ufeff" + json.dumps({"source": "dog", "target": "Hund"})])
    assert read_pairs(objects, cache_dir=tmp_path / "cache")[:] == {"source": ["dog"], "target": ["Hund"]}


def test_a_changed_file_is_read_again(tmp_path):
    file = write(tmp_path / "pairs.tsv", ["a\tb"])
    assert len(read_pairs(file, cache_dir=tmp_path / "cache")) == 1
    write(file, ["a\tb", "c\td"])
    assert len(read_pairs(file, cache_dir=tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    ("counts", "message"),
    [((3, 2), "has 3 lines and .* has 2"), ((2, 3), "has 2 lines and .* has 3"), ((0, 0), "no line")],
)
def test_files_of_unequal_length_are_refused(tmp_path, counts, message):
    files = [write(tmp_path / str(side), ["x"] * count) for side, count in enumerate(counts)]
    with pytest.raises(ValueError, match=message):
        read_parallel(*files, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.tsv", "x\ty\tz", "a.tsv, line 2 has 3 columns"),
        ("b.tsv", "x", "b.tsv, line 2 has 1 columns"),
        ("c.jsonl", "x", "c.jsonl, line 2 is no JSON"),
        ("d.jsonl", '{"source": "x", "target": 1}', "d.jsonl, line 2 is no object with the texts"),
        ("e.jsonl", '["x"]', "e.jsonl, line 2 is no object with the texts"),
        ("f.csv", "x,y", "must end with .tsv or .jsonl"),
    ],
)
def test_other_forms_are_refused_by_file_and_line(tmp_path, name, line, message):
    good = '{"source": "a", "target": "b"}' if ".json" in name else "a\tb"
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / name, [good, line]), cache_dir=tmp_path / "cache")


def test_unreadable_files_are_refused(tmp_path):
    good = write(tmp_path / "good", ["x"])
    latin, cut, missing = tmp_path / "latin", tmp_path / "cut.gz", tmp_path / "missing"
    latin.write_bytes("läuft\n".encode("latin-1"))
    cut.write_bytes(gzip.compress(b"x\n" * 1000)[:-9])
    with pytest.raises(ValueError, match="latin is not UTF-8"):
        read_parallel(good, latin, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"cut.gz cannot be read"):
        read_parallel(cut, good, cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="target_file=.*missing"):
        read_parallel(good, missing)
    with pytest.raises(ValueError, match="holds no pair with text on both sides"):
        read_pairs(write(tmp_path / "blank.tsv", ["\tx"]), cache_dir=tmp_path / "cache")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_shared_tokenizer_ends_every_text(tokenizer, tmp_path):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 300)
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, load_tokenizer(tmp_path)):
        assert candidate.padding_side == "right"
        for text in (*ENGLISH, *GERMAN, "unseen <pad> 語"):
            ids = candidate(text)["input_ids"]
            assert ids[-1] == 1
            assert 1 not in ids[:-1]
            assert 0 not in ids
            assert candidate.decode(ids, skip_special_tokens=True) == text


def test_both_sides_shape_the_vocabulary(pairs):
    one_sided = train_tokenizer(pairs.rename_column("source", "text"), "shifted_bpe", 400).get_vocab()
    both = train_seq2seq_tokenizer(pairs, 400).get_vocab()
    assert "ĠHund" in both
    assert "Ġdog" in both
    assert "ĠHund" not in one_sided
    assert "Ġdog" in one_sided


def test_other_tokenizers_are_made_ready(pairs):
    plain = train_tokenizer(pairs.rename_column("source", "text"), "word")
    ids = plain("A dog runs.")["input_ids"]
    ready = seq2seq_tokenizer(plain)
    assert ready.padding_side == "right"
    assert ready("A dog runs.")["input_ids"] == [*ids, plain.eos_token_id]
    assert seq2seq_tokenizer(ready)("A dog runs.")["input_ids"] == [*ids, plain.eos_token_id]


def test_tokenizers_without_an_end_are_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="no eos_token"):
        seq2seq_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"))


# --- tokens and batches ----------------------------------------------------------------------------------------------


def test_tokens_are_those_of_each_text(pairs, tokenizer):
    tokens = tokenize_pairs(pairs, tokenizer)
    for row, source, target in zip(tokens, ENGLISH, GERMAN, strict=True):
        assert row["input_ids"] == tokenizer(source)["input_ids"]
        assert row["labels"] == tokenizer(target)["input_ids"]
        assert row["length"] == len(row["input_ids"]) + len(row["labels"])


def test_turns_follow_each_other_each_with_its_end(tokenizer):
    conversation = Dataset.from_dict({"source": [ENGLISH[:2], ENGLISH[2:]], "target": GERMAN[:2]})
    expected = [sum((tokenizer(turn)["input_ids"] for turn in turns), []) for turns in (ENGLISH[:2], ENGLISH[2:])]
    assert tokenize_pairs(conversation, tokenizer)["input_ids"][:] == expected
    assert encode_sources([ENGLISH[:2], ENGLISH[2]], tokenizer) == expected
    assert train_seq2seq_tokenizer(conversation, 270).eos_token_id == 1


def test_long_pairs_are_dropped_and_counted(pairs, tokenizer, caplog):
    lengths = [(len(row["input_ids"]), len(row["labels"])) for row in tokenize_pairs(pairs, tokenizer)]
    longest_source, longest_target = (max(side) for side in zip(*lengths, strict=True))
    assert len(tokenize_pairs(pairs, tokenizer, longest_source, longest_target)) == 3
    with caplog.at_level(logging.WARNING):
        kept = tokenize_pairs(pairs, tokenizer, max_source_length=longest_source - 1)
    assert len(kept) == sum(source < longest_source for source, _ in lengths) < 3
    assert f"max_source_length={longest_source - 1}" in caplog.text
    with pytest.raises(ValueError, match="max_target_length=2 leave none of 3 pairs"):
        tokenize_pairs(pairs, tokenizer, max_target_length=2)


def test_batches_are_padded_on_the_right(pairs, tokenizer):
    tokens = tokenize_pairs(pairs, tokenizer)
    batch = PairCollator(tokenizer)(list(tokens))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for row, source, mask, labels in zip(tokens, *(batch[name] for name in batch), strict=True):
        size, length = len(row["input_ids"]), len(row["labels"])
        assert source.tolist() == row["input_ids"] + [0] * (len(source) - size)
        assert mask.tolist() == [1] * size + [0] * (len(source) - size)
        assert labels.tolist() == row["labels"] + [-100] * (len(labels) - length)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_what_tokenize_pairs_refuses(pairs, tokenizer):
    plain = train_tokenizer(pairs.rename_column("source", "text"), "bpe", 300)
    with pytest.raises(ValueError, match="put its eos token behind every text and pad on the right"):
        tokenize_pairs(pairs, plain)
    with pytest.raises(ValueError, match="max_source_length=0 must be at least 1"):
        tokenize_pairs(pairs, tokenizer, max_source_length=0)
    with pytest.raises(ValueError, match="a source is an empty list"):
        encode_sources([["a"], []], tokenizer)
    with pytest.raises(ValueError, match="columns 'source' and 'target', not"):
        tokenize_pairs(pairs.rename_column("source", "en"), tokenizer)
    with pytest.raises(ValueError, match="vocab_size=10 is too small"):
        train_seq2seq_tokenizer(pairs, 10)
