"""Documents in text files: where they begin, that no character is lost, and that a huge one needs little memory."""

import gzip
import random
import re
import tracemalloc
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from hf_efficient.data import train_tokenizer
from hf_efficient.data.text_files import PIECE_CHARACTERS, SEPARATORS, in_pieces, read_text_files

WIKITEXT = """ \n = First article = \n \n Text . \n = = Section = = \n \n = Losses , T = \n More text . \n \n
 = Second = article = \n \n Text = of the second = \n \n = = Only a section = = \n \n"""


def documents_in(path: Path, separator: str) -> list[str]:
    """The documents of one file, their rows joined."""
    documents, parts = [], []
    for row in read_text_files([path], separator):
        assert 0 < len(row["text"]) <= PIECE_CHARACTERS
        parts.append(row["text"])
        if row["ends_document"]:
            documents.append("".join(parts))
            parts = []
    assert not parts, "the last row of a file ends a document"
    return documents


def expected_documents(text: str, separator: str) -> list[str]:
    """The same, from the whole text at once."""
    if separator == "file":
        return [text] if text else []
    if separator == "line":
        return [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    return ["".join(run) for is_blank, run in groupby(lines, lambda line: not line.strip()) if not is_blank]


def random_text(rng: random.Random, length: int) -> str:
    alphabet = ["word", "é", "語", "🙂", " ", "  ", "\n", "\n\n", "\r\n", " \n", "\t", "x" * 40]
    return "".join(rng.choices(alphabet, k=length))


@pytest.mark.parametrize("separator", ["file", "line", "blank_line"])
@pytest.mark.parametrize("compress", [False, True])
def test_documents_are_those_of_the_whole_text(tmp_path, separator, compress):
    rng = random.Random(0)
    for length in (0, 1, 5, 200, 20_000):
        text = random_text(rng, length)
        path = tmp_path / ("a.txt.gz" if compress else "a.txt")
        path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
        assert documents_in(path, separator) == expected_documents(text, separator)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_long_lines_lose_nothing(tmp_path, separator):
    words = "".join(random.Random(1).choices(["a", "bc", " ", "語", "\t"], k=5 * PIECE_CHARACTERS))
    text = "x" + words + "\n\n" + "y" * (3 * PIECE_CHARACTERS) + "\n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    documents = documents_in(path, separator)
    assert len(documents) == (1 if separator in ("file", "wikitext") else 2)
    separated = {"line": text.replace("\n", ""), "blank_line": text.replace("\n\n", "\n")}
    assert "".join(documents) == separated.get(separator, text)


def test_wikitext_articles_begin_at_titles_between_blank_lines(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(WIKITEXT)
    first, second = documents_in(path, "wikitext")
    assert first + second == WIKITEXT
    assert second.startswith(" = Second = article = \n")


def test_no_document_spans_two_files(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "empty.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, ["one", "", "two"], strict=True):
        path.write_text(text)
    rows = list(read_text_files(paths, "file"))
    assert rows == [{"text": "one", "ends_document": True}, {"text": "two", "ends_document": True}]


def test_pieces_are_bounded_and_join_to_the_document():
    rng = random.Random(2)
    for longest in (1, 2, 3, 10, 64):
        documents = [random_text(rng, size) or "x" for size in (1, 3, 60, 200)]
        fragments = []
        for document in documents:
            cuts = sorted(rng.choices(range(len(document) + 1), k=5))
            parts = [document[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
            fragments += [(part, index == 0) for index, part in enumerate(parts)]
        rows = list(in_pieces(fragments, longest))
        assert all(0 < len(row["text"]) <= longest for row in rows)
        assert "".join(row["text"] + "\0" * row["ends_document"] for row in rows).split("\0")[:-1] == documents


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "word"])
def test_cutting_a_document_does_not_change_its_tokens(python_docs, kind):
    tokenizer = train_tokenizer(python_docs, kind, vocab_size=600 if kind == "bpe" else None)
    for name in ("with", "formatstrings", "numbers"):
        text = topics[name].replace("\n\n", "\n \t\n\n")  # longer runs of whitespace, too
        pieces = [row["text"] for row in in_pieces([(text, True)], longest=100)]
        assert len(pieces) > len(text) // 100
        joined = [token_id for ids in tokenizer(pieces)["input_ids"] for token_id in ids]
        assert joined == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("layout", ["one line", "lines"])
def test_memory_does_not_grow_with_the_file(tmp_path, separator, layout):
    path = tmp_path / "large.txt"
    path.write_text(("word " * 15 + ("\n" if layout == "lines" else "")) * 50_000)  # 3.7 MB
    tracemalloc.start()
    size = sum(len(row["text"]) for row in read_text_files([path], separator))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size >= 3_700_000
    assert peak < 500_000


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("offset", [0, 10, 70_000])
def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path, compress, offset):
    path = tmp_path / ("a.txt.gz" if compress else "a.txt")
    content = b"x" * offset + "é".encode("latin-1") + b"yz"
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(ValueError, match=rf"a\.txt.* is not UTF-8 text: .*, 0xe9, at byte {offset}; convert"):
        list(read_text_files([path], "file"))


def test_a_character_cut_off_at_the_end_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc" + "語".encode()[:2])
    with pytest.raises(ValueError, match="is not UTF-8 text: unexpected end of data, 0xe8, at byte 3"):
        list(read_text_files([path], "file"))


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip at all",
        gzip.compress(b"text " * 1000)[:-20],
        gzip.compress(random.Random(0).randbytes(9000))[:4000] + b"\0" * 5000,
    ],
    ids=["plain", "truncated", "damaged"],
)
def test_gzip_that_cannot_be_unpacked_is_refused(tmp_path, content):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt\.gz (cannot be read|is not UTF-8)"):
        list(read_text_files([path], "file"))
