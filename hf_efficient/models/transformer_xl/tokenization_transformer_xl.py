"""Word-level tokenizer of the legacy Transformer-XL checkpoints, without their pickles.

Gives the ids of `TransfoXLTokenizer` (transformers 4), whose words are made by the rules of the Moses toolkit, and
of the original release's `Vocab`, which splits at white space.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping

from transformers import AddedToken, PythonBackend

try:
    import sacremoses
except ImportError:
    sacremoses = None

VOCAB_FILES_NAMES = {
    "vocab_file": "vocab.json",
    "vocab_text_file": "vocab.txt",
    "pickled_vocab_file": "vocab.pkl",
    "torch_vocab_file": "vocab.bin",
}
SPLITTINGS = ("moses", "whitespace", "characters")

# Settings of earlier releases with which vocabularies were counted; they change nothing about a finished one.
LEGACY_INERT = ("special", "min_freq", "max_size", "pretrained_vocab_file", "pretrained_vocab_file_torch")

NUMBER_SEPARATOR = re.compile(r"(?<=\d)[,.](?=\d)")


class TransformerXLTokenizer(PythonBackend):
    """One id per word of a fixed vocabulary.

    Args:
        vocab_file: `vocab.json`, a JSON object of word to id, or a text file with one word per line (its first
            column).
        vocab: The words in the order of their ids, or a mapping of word to id, instead of a file.
        lower_case: Whether text is lowercased, special tokens excepted.
        splitting: `"moses"`: punctuation normalisation and tokenization of Moses, dashes split aggressively, then
            `,` and `.` between digits set apart as `@,@` and `@.@`, as in WikiText-103. `"whitespace"`: as the
            original release. `"characters"`: each character, which transformers 4 wrote as `delimiter=""`.
        language: Two-letter code of the language whose Moses rules are used.
        never_split: Regular expressions of what Moses keeps whole; None means the special tokens.
        unknown_symbol: Word of the vocabulary whose id unknown words get; None means `<unk>`, or else `<UNK>`. It
            can differ from `unk_token`, which transformers 4 added to vocabularies that lacked it.
        unk_token: Special token for unknown words.
        eos_token: Special token for the end of a line or document.
        add_eos: Whether encoding appends `<eos>`.
        add_double_eos: Whether encoding puts `<S>` in front and at the end, as for the One Billion Word corpus.

    Raises:
        ValueError: the vocabulary is missing, there only as a pickle, or malformed; or an argument is illegal.
        ImportError: Moses rules are used, and sacremoses is not installed.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None = None,
        *,
        vocab: Iterable[str] | Mapping[str, int] | None = None,
        lower_case: bool = False,
        splitting: str = "moses",
        language: str = "en",
        never_split: list[str] | None = None,
        unknown_symbol: str | None = None,
        unk_token: str | AddedToken | None = "<unk>",
        eos_token: str | AddedToken | None = "<eos>",
        add_eos: bool = False,
        add_double_eos: bool = False,
        **kwargs,
    ):
        files = {name: kwargs.pop(name, None) for name in VOCAB_FILES_NAMES if name != "vocab_file"}
        for name in LEGACY_INERT:
            kwargs.pop(name, None)
        if kwargs.pop("delimiter", None) == "":
            splitting = "characters"
        _check_settings(splitting, language, add_eos, add_double_eos)

        self.symbols = _read_vocabulary(vocab, vocab_file, files)
        self.symbol_ids = {symbol: index for index, symbol in enumerate(self.symbols)}
        self.lower_case = lower_case
        self.splitting = splitting
        self.language = language
        self.unknown_symbol = unknown_symbol
        self.add_eos = add_eos
        self.add_double_eos = add_double_eos
        self._unknown_id = self._find_unknown()
        self._moses_rules: _MosesRules | None = None
        kwargs["added_tokens_decoder"] = self._beyond_vocabulary(kwargs.get("added_tokens_decoder") or {})
        super().__init__(
            lower_case=lower_case,
            splitting=splitting,
            language=language,
            never_split=never_split,
            unknown_symbol=unknown_symbol,
            unk_token=unk_token,
            eos_token=eos_token,
            add_eos=add_eos,
            add_double_eos=add_double_eos,
            **kwargs,
        )
        self.never_split = self.all_special_tokens if never_split is None else never_split

    # --- vocabulary ---------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of words, without tokens added later."""
        return len(self.symbols)

    def get_vocab(self) -> dict[str, int]:
        """Word to id, with tokens added later."""
        return {**self.symbol_ids, **self._added_tokens_encoder}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `vocab.json` and return its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + VOCAB_FILES_NAMES["vocab_file"])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.symbol_ids, file, ensure_ascii=False, indent=0)
        return (path,)

    def _find_unknown(self) -> int | None:
        candidates = ("<unk>", "<UNK>") if self.unknown_symbol is None else (self.unknown_symbol,)
        found = next((self.symbol_ids[symbol] for symbol in candidates if symbol in self.symbol_ids), None)
        if found is None and self.unknown_symbol is not None:
            raise ValueError(
                f"unknown_symbol={self.unknown_symbol!r} is not in the vocabulary; give a word that is, or None."
            )
        return found

    def _beyond_vocabulary(self, added: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
        """Added tokens under ids that the vocabulary allows.

        transformers 4 wrote ids 0, 1, 2 for the special tokens of a tokenizer that had no vocabulary yet when it was
        made. A token that is a word has that word's id, and one that is not cannot have the id of another word.
        """
        placed = {self.symbol_ids.get(token.content, index): token for index, token in added.items()}
        return {
            index: token
            for index, token in placed.items()
            if index >= len(self.symbols) or self.symbols[index] == token.content
        }

    def _convert_token_to_id(self, token: str) -> int:
        index = self.symbol_ids.get(token, self._unknown_id)
        if index is None:
            raise ValueError(
                f"{token!r} is not in the vocabulary, and neither is <unk> or <UNK> to stand for it; name the word "
                "for unknown words with unknown_symbol."
            )
        return index

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self.symbols):
            raise ValueError(f"id {index} is outside the vocabulary; ids run from 0 to {len(self.symbols) - 1}.")
        return self.symbols[index]

    # --- text to words ------------------------------------------------------------------------------------

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """Words of a text; special tokens in it are kept whole."""
        if self.lower_case:
            text = self._lower(text)
        return super().tokenize(text, **kwargs)

    def _lower(self, text: str) -> str:
        """Lowercase what is no special token, character by character as transformers 4 (it matters for sigma)."""
        kept = [*self.all_special_tokens]
        kept += [token.content for token in self._added_tokens_decoder.values() if not token.special]
        pattern = "|".join([*map(re.escape, kept), "."])
        return re.sub(pattern, lambda match: match[0] if match[0] in kept else match[0].lower(), text)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        text = text.strip()
        if self.lower_case:
            text = text.lower()
        if self.splitting == "characters":
            return list(text)
        if self.splitting == "whitespace":
            return text.split()
        words = self._moses.tokenizer.tokenize(
            self._moses.normalizer.normalize(text),
            aggressive_dash_splits=True,
            return_str=False,
            escape=False,
            protected_patterns=self.never_split,
        )
        return [part for word in words for part in NUMBER_SEPARATOR.sub(r" @\g<0>@ ", word).split()]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids with what `add_eos` or `add_double_eos` asks for around each sequence."""
        before, after = self._border_ids()
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [index for ids in sequences for index in (*before, *ids, *after)]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each id that encoding has put there, 0 for those of the text."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        before, after = ([1] * len(ids) for ids in self._border_ids())
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [mark for ids in sequences for mark in (*before, *[0] * len(ids), *after)]

    def _border_ids(self) -> tuple[list[int], list[int]]:
        if self.add_double_eos:
            border = [self.convert_tokens_to_ids("<S>")]
            return border, border
        return [], [self.convert_tokens_to_ids("<eos>")] if self.add_eos else []

    # --- words to text ------------------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the words; where they were made by Moses rules, its detokenizer joins them.

        Characters are joined by the detokenizer too, with spaces between them, as transformers 4 did.
        """
        if self.splitting == "whitespace":
            return " ".join(tokens)
        text = self._moses.detokenizer.detokenize(tokens)
        return text.replace(" @,@ ", ",").replace(" @.@ ", ".").strip()

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        """As in transformers 4: added tokens that are no words stand apart and are not detokenized."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        apart = self._added_tokens_encoder.keys() - set(self.all_special_tokens)
        apart |= {token for token in map(str, self.extra_special_tokens) if token not in self.symbol_ids}
        pieces: list[str] = []
        for is_apart, group in itertools.groupby(tokens, key=apart.__contains__):
            words = list(group)
            pieces += words if is_apart else [self.convert_tokens_to_string(words)]
        text = " ".join(piece for piece in pieces if piece)
        clean_up = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces is not None:
            clean_up = clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up else text

    @property
    def _moses(self) -> "_MosesRules":
        if self._moses_rules is None:
            self._moses_rules = _MosesRules(self.language)
        return self._moses_rules


class TransfoXLTokenizer(TransformerXLTokenizer):
    """The name in tokenizer_config.json files of transformers 4."""


class _MosesRules:
    """The three tools of Moses for one language."""

    def __init__(self, language: str):
        if sacremoses is None:
            raise ImportError(
                "The Moses rules of this tokenizer need sacremoses; run `pip install 'hf_efficient[legacy]'` or "
                "`pip install sacremoses`."
            )
        self.normalizer = sacremoses.MosesPunctNormalizer(language)
        self.tokenizer = sacremoses.MosesTokenizer(language)
        self.detokenizer = sacremoses.MosesDetokenizer(language)


def _check_settings(splitting: str, language: str, add_eos: bool, add_double_eos: bool) -> None:
    if splitting not in SPLITTINGS:
        raise ValueError(f"splitting={splitting!r} is unknown; choose one of {', '.join(SPLITTINGS)}.")
    # sacremoses makes a file name of it.
    if not re.fullmatch("[a-z]{2,3}", language):
        raise ValueError(f"language={language!r} is no language code; give one such as 'en'.")
    if add_eos and add_double_eos:
        raise ValueError("add_eos=True and add_double_eos=True contradict each other; set one of them to False.")


def _read_vocabulary(
    vocab: Iterable[str] | Mapping[str, int] | None,
    vocab_file: str | None,
    other_files: Mapping[str, str | None],
) -> list[str]:
    """The words in the order of their ids, from the first source that is there."""
    if vocab is not None:
        return _check_vocabulary(vocab, "vocab")
    path = vocab_file or other_files["vocab_text_file"]
    if path is None:
        pickled = other_files["pickled_vocab_file"] or other_files["torch_vocab_file"]
        if pickled is not None:
            raise ValueError(
                f"The vocabulary is there only as a pickle, {pickled}, and loading a pickle can run code. Run "
                f"`hf-efficient convert {os.path.dirname(pickled) or '.'} OUTPUT`, which reads it without running "
                "anything, and load OUTPUT."
            )
        raise ValueError("There is no vocabulary; give vocab_file, vocab, or a folder with vocab.json.")
    try:
        with open(path, encoding="utf-8") as file:
            words = json.load(file) if str(path).endswith(".json") else _first_columns(file)
    except ValueError as error:
        raise ValueError(f"{path} is no vocabulary: {error}. Give a JSON object or one word per line.") from None
    return _check_vocabulary(words, path)


def _first_columns(lines: Iterable[str]) -> list[str]:
    """First column of each line, repeated words once."""
    rows = [line.split() for line in lines]
    if not all(rows):
        raise ValueError(f"line {rows.index([]) + 1} is empty")
    return list(dict.fromkeys(row[0] for row in rows))


def _check_vocabulary(words: Iterable[str] | Mapping[str, int], source: str) -> list[str]:
    """The words in the order of their ids, once ids are seen to be 0, 1, 2, ... and words to be strings."""
    ids = dict(words) if isinstance(words, Mapping) else None
    symbols: list = list(words) if ids is None else [None] * len(ids)
    for symbol, index in (ids or {}).items():
        if not isinstance(index, int) or not 0 <= index < len(symbols) or symbols[index] is not None:
            raise ValueError(
                f"{source}: id {index!r} of {symbol!r} is taken, or is none of 0 to {len(symbols) - 1}; number the "
                "words from 0 without gaps."
            )
        symbols[index] = symbol
    if not symbols or not all(isinstance(symbol, str) for symbol in symbols):
        raise ValueError(f"{source} holds no words, or something that is no string; give at least one word.")
    if len(set(symbols)) != len(symbols):
        raise ValueError(f"{source} holds a word twice; give each word once.")
    return symbols


__all__ = ["TransfoXLTokenizer", "TransformerXLTokenizer"]
