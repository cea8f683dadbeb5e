"""Conversations read, split and cut into pairs, against pairs made by hand."""

import gzip
import json
import logging

import pytest
from datasets import Dataset

from hf_efficient.data import (
    PairCollator,
    conversation_texts,
    join_history,
    read_conversations,
    split_of_conversation,
    tokenize_conversations,
    tokenize_pairs,
    train_seq2seq_tokenizer,
)

TALKS = [
    ["Hi.", "Hello!", "How are you?", "Fine. And you?", "Fine."],
    ["Seen it?", "No."],
    ["Alone."],
]


def write(path, talks):
    lines = [json.dumps({"topic": "weather", "turns": turns}) for turns in talks]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    return read_conversations(write(folder / "talks.jsonl", TALKS), cache_dir=folder)


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return train_seq2seq_tokenizer(conversation_texts(conversations), 300)


def test_reads_turns(conversations):
    assert conversations["turns"][:] == TALKS


def test_reads_gzip_and_strips(tmp_path):
    path = tmp_path / "talks.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"turns": [" Hi. ", "Hello!\\n"]}\n\n'))
    assert read_conversations(path, cache_dir=tmp_path)["turns"][:] == [["Hi.", "Hello!"]]


def test_conversations_without_turns_are_counted(tmp_path, caplog):
    path = write(tmp_path / "talks.jsonl", [["Hi."], [], []])
    assert len(read_conversations(path, cache_dir=tmp_path)) == 1
    assert "2 conversations have no turn" in caplog.text


def test_splits_are_disjoint_and_keep_twins_together(tmp_path):
    talks = [[f"Number {number}.", "Yes."] for number in range(1000)]
    path = write(tmp_path / "talks.jsonl", talks + talks[:50])
    parts = {
        name: [tuple(turns) for turns in read_conversations(path, name, cache_dir=tmp_path)["turns"]]
        for name in ("train", "validation", "test")
    }
    assert sum(map(len, parts.values())) == 1050
    for name, part in parts.items():
        assert all(split_of_conversation(turns) == name for turns in part)
    for name, share in {"train": 0.96, "validation": 0.02, "test": 0.02}.items():
        deviation = (share * (1 - share) / 1000) ** 0.5
        assert abs(len(set(parts[name])) / 1000 - share) < 4 * deviation


def test_split_is_the_same_in_every_release():
    """Or a model would be measured on what an earlier release trained it on."""
    assert [n for n in range(200) if split_of_conversation([str(n)]) == "test"] == [16, 19, 32, 120]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: 'not json' is no conversation; write an object"),
        ('{"turns": "Hi."}', "line 2: .* is no conversation"),
        ('{"turns": ["Hi.", 3]}', "line 2: .* is no conversation"),
        ('["Hi."]', "line 2: .* is no conversation"),
        ('{"turns": ["Hi.", " "]}', "line 2: turn 2 has no text"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "talks.jsonl"
    path.write_text(f'{{"turns": ["Hi."]}}\n{line}\n', "utf-8")
    with pytest.raises(ValueError, match=message):
        read_conversations(path, cache_dir=tmp_path)


def test_bad_sources_and_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match="check the path"):
        read_conversations(tmp_path / "none.jsonl")
    path = write(tmp_path / "talks.jsonl", TALKS[:1])
    with pytest.raises(ValueError, match="split='dev' is none of 'train', 'validation', 'test'"):
        read_conversations(path, "dev")
    other = "test" if split_of_conversation(TALKS[0]) == "train" else "train"
    with pytest.raises(ValueError, match=f"holds no conversation of split='{other}'"):
        read_conversations(path, other, cache_dir=tmp_path)


def test_texts_are_all_turns_once(conversations):
    assert conversation_texts(conversations)["text"][:] == [turn for turns in TALKS for turn in turns]


def test_every_turn_but_the_first_is_a_target(conversations, tokenizer):
    pairs = tokenize_conversations(conversations, tokenizer, max_turns=3)
    by_hand = [
        (["Hi."], "Hello!"),
        (["Hi.", "Hello!"], "How are you?"),
        (["Hi.", "Hello!", "How are you?"], "Fine. And you?"),
        (["Hello!", "How are you?", "Fine. And you?"], "Fine."),
        (["Seen it?"], "No."),
    ]
    expected = Dataset.from_dict({"source": [s for s, _ in by_hand], "target": [t for _, t in by_hand]})
    assert pairs.to_list() == tokenize_pairs(expected, tokenizer).to_list()
    assert pairs["input_ids"][1].count(tokenizer.eos_token_id) == 2
    assert PairCollator(tokenizer)(pairs.to_list())["labels"].shape == (5, max(map(len, pairs["labels"])))


def test_too_long_a_history_loses_its_oldest_turns(conversations, tokenizer):
    lengths = [len(tokenizer(turn)["input_ids"]) for turn in TALKS[0]]
    longest = max(lengths)
    pairs = tokenize_conversations(conversations, tokenizer, max_source_length=longest)
    assert len(pairs) == 5
    for number, source in enumerate(pairs["input_ids"][:4], start=1):
        fitting = [start for start in range(number) if sum(lengths[start:number]) <= longest]
        assert source == [token for turn in TALKS[0][fitting[0] : number] for token in tokenizer(turn)["input_ids"]]


def test_pairs_with_a_long_turn_are_dropped_and_counted(conversations, tokenizer, caplog):
    longest = max(len(tokenizer(turn)["input_ids"]) for turn in TALKS[0])
    with caplog.at_level(logging.WARNING):
        short_targets = tokenize_conversations(conversations, tokenizer, max_target_length=longest - 1)
        short_sources = tokenize_conversations(conversations, tokenizer, max_source_length=longest - 1)
    assert len(short_targets) == len(short_sources) == 4
    assert caplog.text.count("1 of 5 pairs have a turn longer than") == 2
    with pytest.raises(ValueError, match=r"max_target_length=1 leave none of 5 pairs; allow more"):
        tokenize_conversations(conversations, tokenizer, max_target_length=1)


def test_refused_tables_and_numbers(conversations, tokenizer):
    with pytest.raises(ValueError, match="must have the column 'turns'"):
        tokenize_conversations(conversations.rename_column("turns", "lines"), tokenizer)
    with pytest.raises(ValueError, match="max_turns=0 must be at least 1"):
        tokenize_conversations(conversations, tokenizer, max_turns=0)


def test_join_history():
    turns = [[5, 1], [6, 7, 1], [8, 1]]
    assert join_history(turns) == [5, 1, 6, 7, 1, 8, 1]
    assert join_history(turns, max_turns=2) == [6, 7, 1, 8, 1]
    assert join_history(turns, max_length=6) == [6, 7, 1, 8, 1]
    assert join_history(turns, max_length=4) == [8, 1]
    for settings, message in [
        ({"max_turns": 0}, "max_turns=0 must be at least 1"),
        ({"max_length": 1}, "last turn has 2 tokens, more than max_length=1"),
    ]:
        with pytest.raises(ValueError, match=message):
            join_history(turns, **settings)
    with pytest.raises(ValueError, match="begins with a turn"):
        join_history([])
