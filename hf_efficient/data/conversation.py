"""Conversations as pairs to train on: the last turns, and the turn that answers them.

As Meena is trained (Adiwardana et al. 2020, arXiv 2001.09977): the source is the last turns of a conversation, at
most seven, the target the turn after them, and every turn but the first is a target. Conversations are split, not
pairs, so that no turn that was trained on is measured.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .documents import generate_table
from .seq2seq import TOKEN_FEATURES, check_seq2seq_tokenizer, encode_sources
from .text_sources import lines_of

logger = logging.getLogger(__name__)

DEFAULT_MAX_TURNS = 7  # as Meena

# Of a hundred conversations, how many belong to each split; which ones is decided by their text, so that a
# conversation that occurs twice is in one split only.
SPLITS = {"train": range(96), "validation": range(96, 98), "test": range(98, 100)}

# Part of the key under which tables are cached: raise it when the same file would give other conversations.
READER_VERSION = 1
# The same for the tokens of a table.
TOKENS_VERSION = 1


# --- reading ---------------------------------------------------------------------------------------------------------


def read_conversations(
    source: str | PathLike, split: str | None = None, cache_dir: str | PathLike | None = None
) -> Dataset:
    """The conversations of a file as a memory-mapped table with the column "turns", a list of texts.

    source: JSON lines, which may end with .gz; each is an object with the key "turns", what the two sides said in
    turn. Other keys are not read. Conversations without a turn are dropped, and a warning says how many when the file
    is first read. split: "train" (96 %), "validation" (2 %) or "test" (2 %), chosen by a hash of the
    turns; None takes all. cache_dir: folder for the table; None is the cache of `datasets`.

    Raises FileNotFoundError if there is no such file, and ValueError for another split, a line of another form (with
    file and line), a turn without text, or if no conversation is left.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} is none of {', '.join(map(repr, SPLITS))}; leave it out for all.")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"source={str(source)!r} does not exist or is not a file; check the path.")
    stamp = (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
    arguments = {"stamp": stamp, "split": split, "version": READER_VERSION}
    features = Features({"turns": List(Value("string"))})
    cache_dir = None if cache_dir is None else str(cache_dir)
    return generate_table(_rows_of_file, arguments, features, split or "train", cache_dir)


def _rows_of_file(stamp: tuple[str, int, int], split: str | None, version: int) -> Iterator[dict[str, list[str]]]:
    """The conversations of one split with all that identifies them.

    Raises ValueError if there is none, which `datasets` could not make a table of.
    """
    num_read, num_silent = 0, 0
    for place, line in lines_of(stamp[0]):
        turns = _parse(place, line)
        if not turns:
            num_silent += 1
        elif split is None or split_of_conversation(turns) == split:
            num_read += 1
            yield {"turns": turns}
    if num_silent:
        logger.warning("%s: %s conversations have no turn and were dropped.", stamp[0], num_silent)
    if not num_read:
        raise ValueError(f"source={stamp[0]!r} holds no conversation of split={split!r}; give a file with more.")


def _parse(place: str, line: str) -> list[str]:
    """The turns in one line. Raises ValueError, naming `place`, if it is of another form or one has no text."""
    try:
        turns = json.loads(line)["turns"]
    except (ValueError, TypeError, KeyError):
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(
            f'{place}: {line[:60]!r} is no conversation; write an object like {{"turns": ["Hi.", "Hello!"]}}.'
        )
    turns = [turn.strip() for turn in turns]
    if "" in turns:
        raise ValueError(f"{place}: turn {turns.index('') + 1} has no text; write one, or drop the conversation.")
    return turns


def split_of_conversation(turns: Sequence[str]) -> str:
    """The split that a conversation belongs to, the same in every run."""
    digest = hashlib.blake2b("\0".join(turns).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    return next(name for name, numbers in SPLITS.items() if number in numbers)


def conversation_texts(conversations: Dataset) -> Dataset:
    """Every turn once, as a table with the column "text": what a tokenizer is trained on."""
    return conversations.map(
        lambda rows: {"text": [turn for turns in rows["turns"] for turn in turns]},
        batched=True,
        remove_columns=conversations.column_names,
        features=Features({"text": Value("string")}),
        desc="Turns",
    )


# --- pairs -----------------------------------------------------------------------------------------------------------


def join_history(
    encoded_turns: Sequence[list[int]], max_turns: int = DEFAULT_MAX_TURNS, max_length: int | None = None
) -> list[int]:
    """What a model reads of a conversation: the ids of its last turns, one turn after the other.

    encoded_turns: the ids of each turn, its eos token included (`encode_sources`), the oldest first. At most
    `max_turns` of them are taken, and only as many whole turns as have `max_length` ids together; older ones are
    left out.

    Raises ValueError if there is no turn, fewer than one is asked for, or the last one alone is too long.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns={max_turns} must be at least 1.")
    if not encoded_turns:
        raise ValueError("encoded_turns is empty; a conversation begins with a turn.")
    length = len(encoded_turns[-1])
    if max_length is not None and length > max_length:
        raise ValueError(f"The last turn has {length} tokens, more than max_length={max_length}; make it shorter.")
    kept = [encoded_turns[-1]]
    for turn in reversed(encoded_turns[-max_turns:-1]):
        length += len(turn)
        if max_length is not None and length > max_length:
            break
        kept.append(turn)
    return [token_id for turn in reversed(kept) for token_id in turn]


def tokenize_conversations(
    conversations: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int = 128,
    max_target_length: int = 64,
    max_turns: int = DEFAULT_MAX_TURNS,
) -> Dataset:
    """Each turn but the first with the turns before it, as `tokenize_pairs` gives pairs: "input_ids", "labels" and
    "length", the sum of both lengths.

    The source is what `join_history` takes of the turns before: too long a history loses its oldest turns. No turn is
    ever cut: pairs whose target, or the turn right before it, is longer than allowed are dropped, and a warning says
    how many. Each turn is tokenised once; the table lies in the cache of `datasets`.

    Args:
        conversations: table with the column "turns" (`read_conversations`).
        tokenizer: from `train_seq2seq_tokenizer`, or made ready by `seq2seq_tokenizer`.
        max_source_length, max_target_length: most tokens of a side, its eos tokens included.

    Raises ValueError if there is no column "turns", the tokenizer does not end texts with its eos token, a number is
    below 1, or no pair is left.
    """
    limits: dict[str, Any] = {
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
        "max_turns": max_turns,
    }
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{name}={limit} must be at least 1.")
    if "turns" not in conversations.column_names:
        raise ValueError(f"conversations must have the column 'turns', not {conversations.column_names}; rename it.")
    check_seq2seq_tokenizer(tokenizer)
    pairs = conversations.map(
        partial(_pairs_of_rows, tokenizer=tokenizer, version=TOKENS_VERSION, **limits),
        batched=True,
        batch_size=100,
        remove_columns=conversations.column_names,
        features=TOKEN_FEATURES,
        desc="Tokenizing",
    )
    total = sum(len(turns) - 1 for batch in conversations.iter(batch_size=1000) for turns in batch["turns"])
    if not len(pairs):
        raise ValueError(
            f"max_source_length={max_source_length} and max_target_length={max_target_length} leave none of {total:,} "
            "pairs; allow more tokens, and give conversations of at least two turns."
        )
    if len(pairs) < total:
        logger.warning(
            "%s of %s pairs have a turn longer than max_source_length=%s or max_target_length=%s and were dropped.",
            *(total - len(pairs), total, max_source_length, max_target_length),
        )
    return pairs


def _pairs_of_rows(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
    max_turns: int,
    version: int,
) -> dict[str, list]:
    """One batch of `tokenize_conversations`; the arguments are all that identifies the result."""
    encoded = iter(encode_sources([turn for turns in rows["turns"] for turn in turns], tokenizer))
    columns: dict[str, list] = {name: [] for name in TOKEN_FEATURES}
    for turns in rows["turns"]:
        turn_ids = [next(encoded) for _ in turns]
        for number, target in enumerate(turn_ids[1:], start=1):
            if len(turn_ids[number - 1]) <= max_source_length and len(target) <= max_target_length:
                source = join_history(turn_ids[:number], max_turns, max_source_length)
                columns["input_ids"].append(source)
                columns["labels"].append(target)
                columns["length"].append(len(source) + len(target))
    return columns
