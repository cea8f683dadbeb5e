"""Pairs of texts, one the translation of the other: two files line by line, or one file with both sides.

Every reader gives a table with the columns "source" and "target", read once and kept in the cache of `datasets`, so
that a corpus may be larger than memory.
"""

import json
import logging
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from .documents import generate_table
from .text_files import open_text

logger = logging.getLogger(__name__)

# Part of the key under which tables are cached: raise it when the same files would give other pairs.
READER_VERSION = 2

PAIR_FEATURES = Features({"source": Value("string"), "target": Value("string")})

Stamp = tuple[str, int, int]  # path, size and time of a file: what tells whether it changed


def read_parallel(
    source_file: str | PathLike, target_file: str | PathLike, *, cache_dir: str | PathLike | None = None
) -> Dataset:
    """Pairs of two files of which line n of one translates line n of the other, as WMT and Multi30k come.

    The files are UTF-8 text, plain or `.gz`. Whitespace around a line is no part of it. Pairs of which a side is blank
    are dropped, and a warning says how many.

    cache_dir: folder for the table; None is the cache of `datasets`.

    Raises FileNotFoundError for a missing file, ValueError for files of unequal numbers of lines, not UTF-8, not
    readable, or without any pair.
    """
    stamps = _stamp("source_file", source_file), _stamp("target_file", target_file)
    arguments = {"source": stamps[0], "target": stamps[1], "version": READER_VERSION}
    table = generate_table(_parallel_rows, arguments, PAIR_FEATURES, "train", _folder(cache_dir))
    return without_blank_pairs(table, f"{source_file} and {target_file}")


def read_pairs(file: str | PathLike, *, cache_dir: str | PathLike | None = None) -> Dataset:
    """Pairs of one file, `.tsv` or `.jsonl`, plain or `.gz`; otherwise as `read_parallel`.

    A line of a `.tsv` is a source, a tab and a target. A line of a `.jsonl` is an object with the keys "source" and
    "target"; other keys are not read.

    Raises ValueError for another suffix too, and, with file and line, for a line of another form.
    """
    stamp = _stamp("file", file)
    if _suffix(file) not in _PARSERS:
        raise ValueError(f"file={str(file)!r} must end with .tsv or .jsonl, perhaps with .gz behind it; rename it.")
    table = generate_table(
        _rows_of_pairs, {"file": stamp, "version": READER_VERSION}, PAIR_FEATURES, "train", _folder(cache_dir)
    )
    return without_blank_pairs(table, str(file))


def without_blank_pairs(pairs: Dataset, origin: str) -> Dataset:
    """The pairs that have something on both sides; a warning says how many have not.

    origin: where they come from, for messages. Raises ValueError if none is left.
    """
    kept = pairs.filter(_are_filled, batched=True, desc="Looking for blank lines")
    dropped = len(pairs) - len(kept)
    if not len(kept):
        raise ValueError(f"{origin} holds no pair with text on both sides; give a corpus that is not empty.")
    if dropped:
        logger.warning("%s: %s of %s pairs are blank on a side and were dropped.", origin, dropped, len(pairs))
    return kept


def _are_filled(rows: dict[str, list]) -> list[bool]:
    """For each row of a batch, whether both sides have text."""
    return [bool(source) and bool(target) for source, target in zip(rows["source"], rows["target"], strict=True)]


# --- reading ---------------------------------------------------------------------------------------------------------


def _stamp(argument: str, file: str | PathLike) -> Stamp:
    """Raises FileNotFoundError, naming `argument`, if there is no such file."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument}={str(file)!r} does not exist or is not a file; check the path.")
    return str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns


def _folder(cache_dir: str | PathLike | None) -> str | None:
    return None if cache_dir is None else str(cache_dir)


def _suffix(file: str | PathLike) -> str:
    """The suffix of a file's name, without .gz."""
    return Path(Path(file).name.removesuffix(".gz")).suffix


def _lines(file: str) -> Iterator[str]:
    """The lines of a text file, without their ends; blank ones too.

    Raises ValueError, naming the file, if it cannot be read or unpacked, or is not UTF-8.
    """
    try:
        with open_text(Path(file)) as lines:
            for number, line in enumerate(lines):
                # A mark of the byte order, which some editors put in front, is no text.
                yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read ({error}); give a readable text file.") from error


def _parallel_rows(source: Stamp, target: Stamp, version: int) -> Iterator[dict[str, str]]:
    """The pairs of two files, blank ones too; the arguments are all that identifies the result."""
    counts = {source[0]: 0, target[0]: 0}
    for source_line, target_line in zip_longest(_lines(source[0]), _lines(target[0])):
        counts[source[0]] += source_line is not None
        counts[target[0]] += target_line is not None
        if source_line is not None and target_line is not None:
            yield {"source": source_line.strip(), "target": target_line.strip()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"source_file={source[0]!r} has {counts[source[0]]:,} lines and target_file={target[0]!r} has "
            f"{counts[target[0]]:,}; line n of one must translate line n of the other."
        )
    if not counts[source[0]]:
        raise ValueError(f"source_file={source[0]!r} holds no line; give a corpus that is not empty.")


def _rows_of_pairs(file: Stamp, version: int) -> Iterator[dict[str, str]]:
    """The pairs of one file, blank ones too; blank lines are no pairs."""
    parse = _PARSERS[_suffix(file[0])]
    is_empty = True
    for number, line in enumerate(_lines(file[0]), start=1):
        if line.strip():
            is_empty = False
            yield parse(line, f"{file[0]}, line {number}")
    if is_empty:
        raise ValueError(f"file={file[0]!r} holds no pair; give a corpus that is not empty.")


def _parse_tsv(line: str, place: str) -> dict[str, str]:
    parts = [part.strip() for part in line.split("\t")]
    if len(parts) != 2:
        raise ValueError(
            f"{place} has {len(parts)} columns, not a source and a target with a tab between them; keep two columns."
        )
    return {"source": parts[0], "target": parts[1]}


def _parse_json(line: str, place: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error}); write one object a line.") from error
    sides: list[Any] = [row.get(name) if isinstance(row, dict) else None for name in PAIR_FEATURES]
    if not all(isinstance(side, str) for side in sides):
        raise ValueError(f'{place} is no object with the texts "source" and "target".')
    return dict(zip(PAIR_FEATURES, (side.strip() for side in sides), strict=True))


_PARSERS = {".tsv": _parse_tsv, ".jsonl": _parse_json}
