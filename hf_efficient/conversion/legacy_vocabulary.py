"""Vocabularies of earlier Transformer-XL releases -> `TransformerXLTokenizer`, without running anything in them.

Read are `vocab.txt`, `vocab.pkl` (a plain dict, as on the Hub, or the `__dict__` of a whole tokenizer, as
transformers 4 saved it), `vocab.bin` (the same through `torch.save`), and `cache.pt`, the corpus that the original
release keeps beside its data.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.transformer_xl.tokenization_transformer_xl import TransformerXLTokenizer
from .restricted_pickle import InertRecord
from .restricted_reader import read_restricted

# In transformers 4 a vocab.txt overrules a pickle beside it.
VOCABULARY_FILES = ("vocab.txt", "vocab.pkl", "vocab.bin", "cache.pt")

# What `TransfoXLTokenizer` added to every vocabulary that its settings do not mention special tokens for.
LEGACY_EXTRA_TOKENS = ["<formula>"]


@dataclass(frozen=True)
class LegacyVocabulary:
    """Plain data of a vocabulary file.

    Attributes:
        symbols: The words in the order of their ids.
        unknown_symbol: Word whose id unknown words get, where the file says so.
        original: Settings of the original release's `Vocab` (`lower_case`, `splitting`); None for the files of
            transformers 4, whose settings stand in tokenizer_config.json.
    """

    symbols: list[str]
    unknown_symbol: str | None = None
    original: dict[str, Any] | None = None


def find_vocabulary(folder: str | Path) -> Path | None:
    """The vocabulary file that decides in a folder, or None where there is none."""
    candidates = (Path(folder) / name for name in VOCABULARY_FILES)
    return next((path for path in candidates if path.is_file()), None)


def load_legacy_tokenizer(source: str | Path, original_release: bool = False) -> TransformerXLTokenizer:
    """Tokenizer with the ids of an earlier release.

    Args:
        source: A vocabulary file, or a folder with one and, possibly, with tokenizer_config.json,
            special_tokens_map.json and added_tokens.json of transformers 4.
        original_release: Whether a vocab.txt, which does not tell, is one of the original release.

    Raises:
        FileNotFoundError: there is no vocabulary.
        ValueError: a file is truncated, was changed, or its vocabulary is not plain data.
    """
    source = Path(source)
    file = find_vocabulary(source) if source.is_dir() else source
    if file is None:
        raise FileNotFoundError(f"{source} holds no vocabulary; it needs one of {', '.join(VOCABULARY_FILES)}.")
    vocabulary = read_vocabulary(file)
    if original_release and file.suffix == ".txt":
        vocabulary = replace(vocabulary, original={"lower_case": False, "splitting": "whitespace"})
    if vocabulary.original is not None:
        return _original_tokenizer(vocabulary)
    arguments: dict[str, Any] = {"vocab": vocabulary.symbols, "unknown_symbol": vocabulary.unknown_symbol}
    if not source.is_dir():
        return TransformerXLTokenizer(**arguments, extra_special_tokens=LEGACY_EXTRA_TOKENS)
    if not _names_extra_tokens(source):
        arguments["extra_special_tokens"] = LEGACY_EXTRA_TOKENS
    return TransformerXLTokenizer.from_pretrained(source, **arguments)


def read_vocabulary(path: str | Path) -> LegacyVocabulary:
    """Read a vocabulary file of any of the four kinds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, was changed, or its vocabulary is not plain data.
    """
    path = Path(path)
    if path.suffix == ".txt":
        symbols = TransformerXLTokenizer(str(path), splitting="whitespace").symbols
        return LegacyVocabulary(symbols, "<UNK>" if "<UNK>" in symbols else None)
    content = read_restricted(path).root
    fields = content.fields if isinstance(content, InertRecord) else content
    corpus_vocabulary = fields.get("vocab") if isinstance(fields, dict) else None
    if isinstance(corpus_vocabulary, InertRecord):
        fields = corpus_vocabulary.fields
    symbols = _plain_symbols(path, fields)
    unknown = fields.get("unk_idx")
    unknown_symbol = symbols[unknown] if isinstance(unknown, int) and 0 <= unknown < len(symbols) else None
    original = _original_settings(path, fields) if isinstance(corpus_vocabulary, InertRecord) else None
    return LegacyVocabulary(symbols, unknown_symbol, original)


def _plain_symbols(path: Path, fields: Any) -> list[str]:
    """The words of `sym2idx`, once it is seen to be plain data and to agree with `idx2sym`."""
    ids = fields.get("sym2idx") if isinstance(fields, dict) else None
    if not isinstance(ids, dict) or not all(isinstance(word, str) for word in ids):
        raise ValueError(
            f"{path} holds no vocabulary of plain data: its 'sym2idx' is missing or is no mapping of words to ids. "
            "Give the vocab.pkl, vocab.bin or vocab.txt of a Transformer-XL checkpoint."
        )
    symbols = sorted(ids, key=lambda word: ids[word] if isinstance(ids[word], int) else -1)
    listed = fields.get("idx2sym") or symbols
    if [ids[word] for word in symbols] != list(range(len(symbols))) or listed != symbols:
        raise ValueError(
            f"{path} contradicts itself: its words do not have the ids 0 to {len(symbols) - 1}, or 'idx2sym' is not "
            "the inverse of 'sym2idx'. Fetch or save it again."
        )
    return symbols


def _original_settings(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    delimiter = fields.get("delimiter")
    if delimiter not in (None, ""):
        raise ValueError(
            f"{path} splits words at {delimiter!r}; only white space (delimiter=None) and characters "
            "(delimiter='') can be converted."
        )
    splitting = "whitespace" if delimiter is None else "characters"
    return {"lower_case": fields.get("lower_case") is True, "splitting": splitting}


def _original_tokenizer(vocabulary: LegacyVocabulary) -> TransformerXLTokenizer:
    """The original release has no special tokens, only words; those with the usual names become special."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in vocabulary.symbols), None)

    return TransformerXLTokenizer(
        vocab=vocabulary.symbols,
        unknown_symbol=vocabulary.unknown_symbol,
        unk_token=first("<unk>", "<UNK>"),
        eos_token=first("<eos>", "<S>"),
        **(vocabulary.original or {}),
    )


def _names_extra_tokens(folder: Path) -> bool:
    """Whether the settings beside a vocabulary of transformers 4 say what further special tokens it has."""
    names = set()
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if file.is_file():
            try:
                names |= json.loads(file.read_text("utf-8")).keys()
            except (ValueError, AttributeError):
                raise ValueError(f"{file} is no JSON object; mend it, or take it out of the folder.") from None
    return not names.isdisjoint(["additional_special_tokens", "extra_special_tokens"])
