"""From pairs of texts to batches for encoder-decoder models: one vocabulary for both sides, `<eos>` behind each text.

A source may also be a list of texts, the turns of a conversation for example; each gets its own `<eos>`.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

from datasets import Dataset, Features, List, Value
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .documents import generate_table
from .tokenization import train_tokenizer

logger = logging.getLogger(__name__)

# Part of the key under which tables are cached: raise it when the same arguments would give other tokens.
TOKENS_VERSION = 1

TOKEN_FEATURES = Features({"length": Value("int32")} | dict.fromkeys(("input_ids", "labels"), List(Value("int32"))))

Texts = str | list[str]


# --- tokenizers ------------------------------------------------------------------------------------------------------


def train_seq2seq_tokenizer(
    pairs: Dataset, vocab_size: int | None = None, lowercase: bool = False
) -> PreTrainedTokenizerBase:
    """One byte-level BPE for both sides of `pairs`, ready for an encoder-decoder model.

    "<pad>" is 0 and begins the decoder's input, "<eos>" is 1 and stands behind every text, as in tensor2tensor. Any
    text comes back exactly. The same pairs give the same tokenizer.

    Args:
        pairs: table with the columns "source" and "target", or with the column "text"; it is read once.
        vocab_size: number of ids, the two special ones included; None takes 16,384.
        lowercase: lower-case every text first.

    Raises ValueError for a table without these columns, or fewer than 258 ids.
    """
    texts = pairs
    if "text" not in pairs.column_names:
        check_pairs(pairs)
        texts = generate_table(_texts, {"pairs": pairs}, Features({"text": Value("string")}), "train", None)
    return seq2seq_tokenizer(train_tokenizer(texts, "shifted_bpe", vocab_size, lowercase))


def seq2seq_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, changed in place so that it puts the eos token behind every text and pads on the right.

    (Labels are padded on the tokenizer's side, and decoder inputs made from labels with pads in front would begin with
    pads.) A tokenizer that ends texts with its eos token already keeps its own way of doing so.

    Raises ValueError if it has no eos or no pad token, TypeError if it must be changed and is not a fast tokenizer.
    """
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer has no {name}, which an encoder-decoder model needs; set tokenizer.{name}.")
    tokenizer.padding_side = "right"
    if _ends_texts(tokenizer):
        return tokenizer
    if not tokenizer.is_fast:
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which cannot be made to end texts with its eos token; "
            "take a fast tokenizer."
        )
    ending = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}",
        pair=f"$A {tokenizer.eos_token} $B:1 {tokenizer.eos_token}:1",
        special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = ending if before is None else ProcessorSequence([before, ending])
    return tokenizer


def check_seq2seq_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if `tokenizer` does not put its eos token behind every text, or pads on the left."""
    if tokenizer.padding_side != "right" or not _ends_texts(tokenizer):
        raise ValueError(
            "tokenizer must put its eos token behind every text and pad on the right; pass it through "
            "hf_efficient.data.seq2seq_tokenizer first."
        )


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]


def check_pairs(pairs: Dataset) -> None:
    """Raises ValueError if there are not the columns "source" and "target"."""
    if not {"source", "target"} <= set(pairs.column_names):
        raise ValueError(f"pairs must have the columns 'source' and 'target', not {pairs.column_names}; rename them.")


def _texts(pairs: Dataset) -> Iterator[dict[str, str]]:
    """Every text of both sides, one by one."""
    for batch in pairs.iter(batch_size=1000):
        for source, target in zip(batch["source"], batch["target"], strict=True):
            for text in (*_as_list(source), target):
                yield {"text": text}


def _as_list(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


# --- from pairs to tokens --------------------------------------------------------------------------------------------


def encode_sources(sources: Sequence[Texts], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each source as a model reads it: every text of it with its eos token, one after the other.

    Raises ValueError for a source that is an empty list.
    """
    parts = [_as_list(source) for source in sources]
    if not all(parts):
        raise ValueError("a source is an empty list, which leaves a model nothing to read; give at least one text.")
    encoded = iter(_encode([text for texts in parts for text in texts], tokenizer))
    return [[token for _ in texts for token in next(encoded)] for texts in parts]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, with what the tokenizer adds."""
    if not texts:
        return []
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]


def tokenize_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> Dataset:
    """The tokens of pairs, row by row: "input_ids" and "labels" (int32), and "length", the sum of both lengths.

    No text is ever cut: pairs of which a side is longer than allowed are dropped, and a warning says how many; their
    number is `len(pairs)` less the length of the result. The table lies in the cache of `datasets` and is used again
    for the same pairs, tokenizer and lengths.

    Args:
        pairs: table with the columns "source" (a text, or a list of texts) and "target".
        tokenizer: from `train_seq2seq_tokenizer`, or made ready by `seq2seq_tokenizer`.
        max_source_length, max_target_length: most tokens of a side, its eos tokens included; None allows any number.

    Raises ValueError for a table without these columns, a tokenizer that does not end texts with its eos token or pads
    on the left, a length below 1, or if no pair is left.
    """
    check_pairs(pairs)
    check_seq2seq_tokenizer(tokenizer)
    limits = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit} must be at least 1; None allows any length.")
    tokens = pairs.map(
        partial(_tokenize_rows, tokenizer=tokenizer, version=TOKENS_VERSION),
        batched=True,
        remove_columns=pairs.column_names,
        features=TOKEN_FEATURES,
        desc="Tokenizing",
    )
    return tokens if limits == dict.fromkeys(limits) else _without_long_pairs(tokens, **limits)


def _tokenize_rows(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, version: int) -> dict[str, list]:
    """One batch of `tokenize_pairs`; the arguments are all that identifies the result."""
    sources, targets = encode_sources(rows["source"], tokenizer), _encode(rows["target"], tokenizer)
    lengths = [len(source) + len(target) for source, target in zip(sources, targets, strict=True)]
    return {"input_ids": sources, "labels": targets, "length": lengths}


def _without_long_pairs(tokens: Dataset, max_source_length: int | None, max_target_length: int | None) -> Dataset:
    """The pairs whose sides are at most that long."""
    limits = [float("inf") if limit is None else limit for limit in (max_source_length, max_target_length)]
    kept = tokens.filter(partial(_are_short, limits=limits), batched=True, desc="Looking for long pairs")
    if not len(kept):
        raise ValueError(
            f"max_source_length={max_source_length} and max_target_length={max_target_length} leave none of "
            f"{len(tokens):,} pairs; allow more tokens."
        )
    if len(kept) < len(tokens):
        logger.warning(
            "%s of %s pairs are longer than max_source_length=%s or max_target_length=%s and were dropped.",
            *(len(tokens) - len(kept), len(tokens), max_source_length, max_target_length),
        )
    return kept


def _are_short(rows: dict[str, list], limits: list[float]) -> list[bool]:
    """For each row of a batch, whether both sides keep to their limits."""
    sides = zip(rows["input_ids"], rows["labels"], strict=True)
    return [len(source) <= limits[0] and len(target) <= limits[1] for source, target in sides]


# --- batches ---------------------------------------------------------------------------------------------------------


class PairCollator(DataCollatorForSeq2Seq):
    """transformers' collator: sources padded with the pad token, labels with -100, both on the right.

    It is called with rows of `tokenize_pairs`, whose column "length" is no input of a model and is left out.
    """

    def __call__(self, features: list[dict], return_tensors: str | None = None):
        rows = [{name: value for name, value in row.items() if name != "length"} for row in features]
        return super().__call__(rows, return_tensors)
