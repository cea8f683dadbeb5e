"""Text files as a stream of documents, in pieces of bounded size.

A document may be larger than memory: one file of 100 GB is one document. It therefore travels as consecutive rows
`{"text": str, "ends_document": bool}` of at most `PIECE_CHARACTERS` characters; joined, they are its text, exactly.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TextIO

# Longest text of one row. `datasets` works on 1,000 rows at a time: 8 million characters, 130 MB with their tokens.
PIECE_CHARACTERS = 1 << 13

Row = dict[str, str | bool]
Fragment = tuple[str, bool]  # a part of a document, and whether it is the first part of one

# One "=" on each side makes a title of an article; two and more mark the sections inside it.
WIKITEXT_TITLE = re.compile(r" = (?!= ).*(?<! =) = \r?\n?")


def read_text_files(paths: Iterable[Path], document_separator: str) -> Iterator[Row]:
    """The documents of UTF-8 text files, plain or gzip, one file after the other. No document spans two files.

    document_separator: a key of `SEPARATORS`.
    Raises ValueError, naming the file, if one cannot be read or unpacked, or is not UTF-8.
    """
    for path in paths:
        try:
            with open_text(path) as file:
                yield from _documents(file, path, document_separator)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read ({error}); give a readable text file.") from error


def open_text(path: Path) -> TextIO:
    """Open a plain or gzip text file, by its suffix. Only "\\n" ends a line, and every character stays as it is."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def _documents(file: TextIO, path: Path, document_separator: str) -> Iterator[Row]:
    """The documents of one open file."""
    try:
        yield from in_pieces(SEPARATORS[document_separator](file))
    except UnicodeDecodeError as error:
        offset = file.buffer.tell() - len(error.object) + error.start
        found = f"{error.reason}, 0x{error.object[error.start]:02x}, at byte {offset}"
        raise ValueError(f"{path} is not UTF-8 text: {found}; convert it to UTF-8.") from error


# --- where documents begin -------------------------------------------------------------------------------------------


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of `file` with their ends. A line that may be too long for memory comes in several parts."""
    return iter(lambda: file.readline(PIECE_CHARACTERS), "")


def _whole_file(file: TextIO) -> Iterator[Fragment]:
    """The file is one document."""
    starts = True
    for block in iter(lambda: file.read(PIECE_CHARACTERS), ""):
        yield block, starts
        starts = False


def _one_per_line(file: TextIO) -> Iterator[Fragment]:
    """Each line is a document, without its line end. Blank lines are left out."""
    begun = False
    for line in _lines(file):
        text = line.rstrip("\r\n") if line.endswith("\n") else line
        if text.strip() or (text and begun):
            yield text, not begun
            begun = True
        if line.endswith("\n"):
            begun = False


def _between_blank_lines(file: TextIO) -> Iterator[Fragment]:
    """Each run of lines is a document. The blank lines between two of them belong to neither."""
    begun, line_starts = False, True
    for line in _lines(file):
        if line_starts and not line.strip():
            begun = False
        else:
            yield line, not begun
            begun = True
        line_starts = line.endswith("\n")


def _wikitext_articles(file: TextIO) -> Iterator[Fragment]:
    """An article begins at its title: a line ` = Title = ` between blank lines, as in WikiText-2 and WikiText-103.

    The blank lines matter, since lines such as ` = Losses , T = ` occur inside articles. With them, WikiText-2 has the
    600 + 60 + 60 articles that its paper counts. What stands before the first title belongs to the first article.
    """
    previous, line, has_text = "", "", False
    for following in chain(_lines(file), [""]):
        is_title = WIKITEXT_TITLE.fullmatch(line) and not previous.strip() and not following.strip()
        yield line, bool(is_title) and has_text
        has_text = has_text or bool(line.strip())
        previous, line = line, following


SEPARATORS: dict[str, Callable[[TextIO], Iterator[Fragment]]] = {
    "file": _whole_file,
    "line": _one_per_line,
    "blank_line": _between_blank_lines,
    "wikitext": _wikitext_articles,
}


# --- pieces of bounded size ------------------------------------------------------------------------------------------


def in_pieces(fragments: Iterable[Fragment], longest: int = PIECE_CHARACTERS) -> Iterator[Row]:
    """Join the fragments of each document, and cut it again into rows of at most `longest` characters."""
    text = ""
    for fragment, starts_document in fragments:
        if starts_document and text:
            yield {"text": text, "ends_document": True}
            text = ""
        text += fragment
        while len(text) > longest:
            cut = _cut_position(text[:longest])
            yield {"text": text[:cut], "ends_document": False}
            text = text[cut:]
    if text:
        yield {"text": text, "ends_document": True}


def _cut_position(window: str) -> int:
    """Where to cut, so that the two sides have the tokens that the whole has.

    That is before a whitespace character that follows or precedes other text: words stay whole, and GPT-2's pattern
    (` ?\\p{L}+`, `\\s+(?!\\S)`, ...) joins nothing across it. A window without whitespace is cut at its end.
    """
    words = window.rsplit(maxsplit=1)
    if not words:
        return len(window)
    trailing = len(window) - len(window.rstrip())
    cut = len(window) - (trailing or len(words[-1]) + 1)
    return cut if cut > 0 else len(window)
