"""Tokenizer of the Reformer: a SentencePiece model of merges (BPE), without the package sentencepiece.

A `spiece.model` is a message of protocol buffers (github.com/google/sentencepiece, sentencepiece_model.proto); the few
fields that a tokenizer of this kind needs are read here. The ids are those that sentencepiece itself gives.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE = "▁"
# Values of enumerations in sentencepiece_model.proto.
UNIGRAM, BPE = 1, 2
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


@dataclass
class SentencePieceModel:
    """What a tokenizer needs of a `spiece.model`.

    Attributes:
        pieces: Text and kind of every id.
        kind: `UNIGRAM` or `BPE`.
        charsmap: Compiled rules of normalisation, empty for none.
        is_plain: Whether spaces are treated as sentencepiece does by default, and no byte stands for itself.
    """

    pieces: list[tuple[str, int]] = field(default_factory=list)
    kind: int = UNIGRAM
    charsmap: bytes = b""
    is_plain: bool = True


class ReformerTokenizer(PreTrainedTokenizerFast):
    """Loads `tokenizer.json`, or else a SentencePiece model (`spiece.model`) of 2020."""

    vocab_files_names = {"vocab_file": "spiece.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Arguments of the constructor from those that `from_pretrained` collects.

        Raises:
            ValueError: `spiece.model` is no SentencePiece model, or one of another kind.
        """
        if kwargs.get("tokenizer_file") is not None or kwargs.get("vocab_file") is None:
            return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
        path = kwargs.pop("vocab_file")
        kwargs.pop("tokenizer_file", None)
        model = read_sentencepiece(path)
        kinds = {kind: piece for piece, kind in reversed(model.pieces)}
        control = [piece for piece, kind in model.pieces if kind in (CONTROL, USER_DEFINED)]
        kwargs.setdefault("unk_token", kinds.get(UNKNOWN))
        if "</s>" in control:
            kwargs.setdefault("eos_token", "</s>")
        named = {str(kwargs.get(name)) for name in ("eos_token", "bos_token", "pad_token")}
        kwargs.setdefault("extra_special_tokens", [piece for piece in control if piece not in named])
        return kwargs | {"tokenizer_object": build_tokenizer(model)}


def build_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """The same merges, normalisation and treatment of spaces."""
    vocab = {piece: index for index, (piece, _) in enumerate(model.pieces)}
    unknown = next((piece for piece, kind in model.pieces if kind == UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(model), unk_token=unknown, fuse_unk=True))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    # Spaces at the ends go, and of several one stays.
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    for piece, kind in model.pieces:
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece, normalized=False, special=kind == CONTROL)])
    return tokenizer


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two; earlier pieces are made first, whatever they are made of."""
    ids = {piece: index for index, (piece, kind) in enumerate(model.pieces) if kind not in (UNKNOWN, CONTROL)}
    merges = []
    for piece in ids:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((pair for pair in halves if pair[0] in ids and pair[1] in ids), key=lambda p: ids[p[0]])
    return merges


# --- the file ------------------------------------------------------------------------------------------------


def read_sentencepiece(path: str) -> SentencePieceModel:
    """Read a `spiece.model`.

    Raises:
        ValueError: it is damaged or no such file; it is not of merges; spaces mean something else in it.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        model = _read_model(content)
    except (ValueError, IndexError, struct.error, TypeError):
        raise ValueError(f"{path} is no SentencePiece model, or it is damaged; fetch it again.") from None
    if not model.pieces:
        raise ValueError(f"{path} is no SentencePiece model: it has no pieces. Fetch it again.")
    if model.kind != BPE or not model.is_plain:
        raise ValueError(
            f"{path} is a SentencePiece model of another kind than the Reformer's, which is model_type=bpe with the "
            "default treatment of spaces; load it with transformers' own classes."
        )
    return model


def _read_model(content: bytes) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            model.pieces.append((piece[1].decode("utf-8"), piece.get(3, 1)))
        elif number == 2:
            settings = dict(_fields(value))
            model.kind = settings.get(3, UNIGRAM)
            model.is_plain &= not settings.get(24) and not settings.get(35)  # spaces behind words; bytes
        elif number == 3:
            settings = dict(_fields(value))
            model.charsmap = settings.get(2, b"")
            # A space before the first word; no others at the ends; "▁" for spaces.
            model.is_plain &= all(settings.get(name, 1) == 1 for name in (3, 4, 5))
    return model


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: whole numbers, or bytes."""
    position = 0
    value: int | bytes
    while position < len(content):
        key, position = _varint(content, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(content, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            value, position = content[position : position + length], position + length
        elif kind == 2:
            length, position = _varint(content, position)
            value, position = content[position : position + length], position + length
        else:
            raise ValueError(f"field of kind {kind}")
        if position > len(content):
            raise ValueError("cut off")
        yield key >> 3, value


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("number too long")


__all__ = ["ReformerTokenizer"]
