"""LAMBADA: the last word of a passage, which only the whole passage tells (Paperno et al. 2016, arXiv 1606.06031)."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .continuations import score_continuations
from .text_sources import lines_of


def read_lambada(source: str | Path) -> Iterator[str]:
    """The passages of a file: one in a line, as text or as JSON with the key "text"; the file may end with .gz.

    From Paperno et al. 2016, arXiv 1606.06031.
    """
    for _, line in lines_of(source):
        yield (json.loads(line)["text"] if line.startswith("{") else line).strip()


def last_word_ids(
    passage: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """The ids of a passage, cut before its last word: context, and last word with the space before it.

    max_length: the last so many tokens of the passage are kept, as for a model with so many positions.

    A token that held the end of the context and the beginning of the word at once would count to the word.
    Raises ValueError for a passage of fewer than two words, or if the context would be cut away.
    """
    context, _, word = passage.rstrip().rpartition(" ")
    if not context.strip():
        raise ValueError(f"passage={passage!r} has fewer than two words; give one with a context.")
    before, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context.rstrip(), passage.rstrip())
    )
    shared = next((i for i, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
    start = 0 if max_length is None else max(0, len(whole) - max_length)
    if start >= shared:
        raise ValueError(f"max_length={max_length} leaves no context before the last word, {word!r}; allow more.")
    return whole[start:shared], whole[shared:]


def evaluate_lambada(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Iterable[str],
    batch_size: int = 16,
    max_length: int | None = None,
) -> dict[str, float]:
    """How well a language model predicts the last words.

    Returns "accuracy": share of the passages whose last word, all its tokens, is what greedy decoding writes.
    "perplexity": exp of the mean negative log-probability of the last word as a whole. "unknown_words": share of the
    last words that hold an unknown token; they never count as right. "num_passages".

    model: a causal language model in evaluation mode. max_length: as for `last_word_ids`.
    Raises ValueError if there is no passage, and as `last_word_ids` does.
    """
    examples = [last_word_ids(passage, tokenizer, max_length) for passage in passages]
    if not examples:
        raise ValueError("passages is empty; give at least one.")
    scores = list(score_continuations(model, examples, batch_size))
    is_known = [tokenizer.unk_token_id not in word for _, word in examples]
    hits = [score.is_likeliest and known for score, known in zip(scores, is_known, strict=True)]
    mean = sum(score.log_probability for score in scores) / len(scores)
    return {
        "accuracy": sum(hits) / len(scores),
        "perplexity": math.exp(-mean),
        "unknown_words": 1 - sum(is_known) / len(scores),
        "num_passages": len(scores),
    }
