"""Tokenizers trained on a corpus, and the memory-mapped table of its tokens.

The kinds are what the published experiments use: bytes (enwik8, in two numberings), characters (text8), words (Penn
Treebank, WikiText) and byte-level BPE. All are fast tokenizers that `AutoTokenizer` loads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from os import PathLike

import numpy as np
from datasets import Dataset, Features, List, Value, is_progress_bar_enabled
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD, UNK = "<eos>", "<pad>", "<unk>"
DEFAULT_BPE_VOCAB_SIZE = 16_384
SMALLEST_VOCAB_SIZE = {
    **{"byte": 256 + 2, "shifted_byte": 256 + 2, "char": 3 + 1, "word": 3 + 1},
    **{"bpe": 256 + 2, "shifted_bpe": 256 + 2},
}

# Part of the key under which tables are cached: raise it when the same arguments would give other tokens.
TOKENS_VERSION = 1

# Characters given to the tokenizer at once: enough to keep its threads busy, while what it returns stays below 100 MB.
CHARACTERS_PER_CALL = 1 << 19


# --- training --------------------------------------------------------------------------------------------------------


def train_tokenizer(
    documents: Dataset, kind: str, vocab_size: int | None = None, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of six kinds, with the special tokens "<eos>" and "<pad>".

    | kind | tokens | ids |
    |---|---|---|
    | "byte" | bytes of UTF-8 | the byte itself; eos 256, pad 257 |
    | "shifted_byte" | bytes of UTF-8 | pad 0, eos 1, then the bytes: trax's enwik8, google/reformer-enwik8 |
    | "char" | characters | eos 0, pad 1, unk 2, then by frequency |
    | "bpe" | byte-level BPE, with GPT-2's pattern | eos 0, pad 1, then bytes, then merges |
    | "shifted_bpe" | the same | pad 0, eos 1, then bytes, then merges: tensor2tensor's first two ids |
    | "word" | what stands between whitespace | eos 0, pad 1, unk 2, then by frequency |

    Bytes and BPE give any text back exactly, "char" any text of known characters; what "char" and "word" do not
    know is "<unk>". Ids by frequency are what an adaptive softmax needs. Special tokens written in a text are text:
    "<eos>" in a page about tokenizers is five characters, not its end. ("word" looks words up as they stand, so that
    the "<unk>" of Penn Treebank and WikiText is the unknown word.) The same documents give the same tokenizer.

    Args:
        documents: table with the column "text"; it is read once.
        vocab_size: number of ids, special tokens included; the rarest are dropped. None takes every character or word,
            and 16,384 for BPE. Bytes always have 258.
        lowercase: lower-case every text first.

    Raises ValueError for an unknown kind, a vocabulary size that the kind cannot have, or documents without "text".
    """
    if kind not in _TRAINERS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(map(repr, _TRAINERS))}.")
    if vocab_size is not None and vocab_size < SMALLEST_VOCAB_SIZE[kind]:
        raise ValueError(
            f"vocab_size={vocab_size} is too small; kind={kind!r} needs at least {SMALLEST_VOCAB_SIZE[kind]} ids."
        )
    if kind in ("byte", "shifted_byte") and vocab_size not in (None, 258):
        raise ValueError(f"vocab_size={vocab_size} does not fit kind={kind!r}, which has 258 ids; leave it out.")
    _check_text(documents)
    normalizer = normalizers.Lowercase() if lowercase else None
    tokenizer = _TRAINERS[kind](_texts(documents, normalizer), vocab_size)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK if kind in ("char", "word") else None,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _check_text(documents: Dataset) -> None:
    """Raises ValueError if there is no column "text"."""
    if "text" not in documents.column_names:
        raise ValueError(f"documents must have the column 'text', not {documents.column_names}; rename the right one.")


def _texts(documents: Dataset, normalizer: normalizers.Normalizer | None) -> Iterator[str]:
    """The texts one by one, as the tokenizer will see them."""
    for batch in documents.iter(batch_size=100):
        yield from map(normalizer.normalize_str, batch["text"]) if normalizer is not None else batch["text"]


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers: itself if printable, else one above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _train_byte(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    return _byte_level([*_byte_symbols(), EOS, PAD])


def _train_shifted_byte(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    return _byte_level([PAD, EOS, *_byte_symbols()])


def _byte_level(symbols: list[str]) -> Tokenizer:
    """Byte-level BPE without merges, with ids in the order given; there is nothing to learn."""
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_char(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """BPE without merges over the characters of the corpus."""
    counts = Counter(chain.from_iterable(texts))
    tokenizer = Tokenizer(models.BPE(vocab=_by_frequency(counts, vocab_size), merges=[], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _train_word(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """A table of the words of the corpus."""
    counts = Counter(chain.from_iterable(map(str.split, texts)))
    tokenizer = Tokenizer(models.WordLevel(_by_frequency(counts, vocab_size), unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int | None, special_tokens: Sequence[str] = (EOS, PAD)) -> Tokenizer:
    """Byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or DEFAULT_BPE_VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=is_progress_bar_enabled(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _by_frequency(counts: Counter[str], vocab_size: int | None) -> dict[str, int]:
    """Ids for the special tokens, then for the most frequent symbols; ties go by the symbols' characters."""
    special = (EOS, PAD, UNK)
    symbols = sorted(counts.keys() - set(special), key=lambda symbol: (-counts[symbol], symbol))
    return {symbol: index for index, symbol in enumerate(islice(chain(special, symbols), vocab_size))}


_TRAINERS: dict[str, Callable[[Iterable[str], int | None], Tokenizer]] = {
    "byte": _train_byte,
    "shifted_byte": _train_shifted_byte,
    "char": _train_char,
    "bpe": _train_bpe,
    "shifted_bpe": partial(_train_bpe, special_tokens=(PAD, EOS)),
    "word": _train_word,
}


def load_tokenizer(path_or_name: str | PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the Hub.

    Raises FileNotFoundError if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path_or_name))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path_or_name={str(path_or_name)!r} holds no tokenizer that can be loaded "
            f"({' '.join(str(error).split())}); give a folder that `save_pretrained` wrote."
        ) from error


# --- from documents to tokens ----------------------------------------------------------------------------------------


def tokenize_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    add_eos: bool = True,
    eos_per_line: bool = False,
    *,
    num_proc: int | None = None,
) -> Dataset:
    """The tokens of documents, row by row: "input_ids" (int32), "num_bytes", and "ends_document" if documents have it.

    "num_bytes" is the length of the row's text in UTF-8, whatever its tokens: bits per byte divide by the sum.
    The table lies beside that of the documents, in the cache of `datasets`, and is used again for the same documents,
    tokenizer and options. Documents that live in memory give tokens that live in memory.

    Args:
        documents: table with the column "text" (`load_documents`).
        add_eos: end each document with the tokenizer's eos token, once.
        eos_per_line: an eos token in place of each line end, as usual for Penn Treebank and WikiText.
        num_proc: processes to share the work; without them, a fast tokenizer still uses several threads.

    Raises ValueError if there is no column "text", or no eos token though one is asked for.
    """
    _check_text(documents)
    if (add_eos or eos_per_line) and tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer has no eos token; set tokenizer.eos_token, or add_eos=False and eos_per_line=False."
        )
    kept = {"ends_document": Value("bool")} if "ends_document" in documents.column_names else {}
    return documents.map(
        partial(
            _tokenize_rows, tokenizer=tokenizer, add_eos=add_eos, eos_per_line=eos_per_line, version=TOKENS_VERSION
        ),
        batched=True,
        remove_columns=[name for name in documents.column_names if name not in kept],
        features=Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")} | kept),
        num_proc=num_proc,
        desc="Tokenizing",
    )


def _tokenize_rows(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, add_eos: bool, eos_per_line: bool, version: int
) -> dict[str, list]:
    """One batch of `tokenize_documents`; the arguments are all that identifies the result."""
    texts = rows["text"]
    encode = _encode_lines if eos_per_line else _encode
    token_ids = list(chain.from_iterable(encode(group, tokenizer) for group in _groups(texts)))
    if add_eos:
        eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
        for row, ends_document in enumerate(rows.get("ends_document", [True] * len(texts))):
            if ends_document and not np.array_equal(token_ids[row][-1:], eos):
                token_ids[row] = np.concatenate((token_ids[row], eos))
    return {"input_ids": token_ids, "num_bytes": [len(text.encode()) for text in texts]}


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Runs of texts of about `CHARACTERS_PER_CALL` characters together."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= CHARACTERS_PER_CALL:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The ids of each text, int32, without any that the tokenizer would add."""
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [np.array(token_ids, dtype=np.int32) for token_ids in encoded["input_ids"]]


def _encode_lines(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The ids of each text with the eos id in place of each line end."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    lines = [text.split("\n") for text in texts]
    encoded = iter(_encode(list(chain.from_iterable(lines)), tokenizer))
    joined = []
    for lines_of_text in lines:
        parts = [part for line in islice(encoded, len(lines_of_text)) for part in (line, eos)]
        joined.append(np.concatenate(parts[:-1]))  # what follows the last line end is a line without one
    return joined
