"""From what a user calls a corpus to a memory-mapped table of documents."""

import platform
import re
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, NamedSplit, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .python_docs import SPLITS, read_python_docs
from .text_files import SEPARATORS, read_text_files

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".text", ".tokens", ".raw", ".md", ".rst")
WORDS_FOR_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}

# Part of the key under which tables are cached: raise it when the same corpus would give other documents.
READER_VERSION = 1

Source = str | PathLike | Sequence[str | PathLike]


def load_documents(
    source: Source,
    split: str = "train",
    text_column: str = "text",
    *,
    document_separator: str = "file",
    config_name: str | None = None,
    cache_dir: str | PathLike | None = None,
) -> Dataset:
    """The documents of a corpus, which may be larger than memory, as a memory-mapped table with the column "text".

    Each row is a document, with one exception: a document of a text file may be longer than a row should be. The
    table of a text file therefore has the column "ends_document" (bool) too, and a document is the rows up to one
    where it is true; keep them in order. `tokenize_documents` and `segment_lanes` know this column.

    Args:
        source: one of
            - a UTF-8 text file, plain or `.gz`, or several in a list;
            - a folder of text files (`.txt`, `.tokens`, `.raw`, `.md`, ..., in sub-folders too, sorted by path). If
              they are named for splits ("wiki.valid.tokens", "test/a.txt"), those of `split`, else all, as "train";
            - a folder that `Dataset.save_to_disk` wrote, or a name that `datasets.load_dataset` knows;
            - "python-docs", the language reference that comes with Python: no download, train, validation and test.
        split: the split's name; for `load_dataset` also a slice. Files given by name have the split "train" only.
        text_column: of a dataset, the column with the text.
        document_separator: of text files, what a document is: "file" the whole file, "line" each line that is not
            blank, "blank_line" each paragraph, "wikitext" each article in the format of WikiText.
        config_name: for `load_dataset`, which configuration, as in "wikitext-103-raw-v1".
        cache_dir: folder for the tables; None is the cache of `datasets`. Files that did not change are read once.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: the corpus is empty, not UTF-8 or not readable, or has no such split or column.
        TypeError: the text column does not hold text.
    """
    if document_separator not in SEPARATORS:
        raise ValueError(f"document_separator={document_separator!r} is none of {', '.join(map(repr, SEPARATORS))}.")
    cache_dir = None if cache_dir is None else str(cache_dir)
    files = [] if source == PYTHON_DOCS else _text_files(source, split)
    if files:
        return _from_text_files(files, split, document_separator, cache_dir)
    if document_separator != "file":
        raise ValueError(
            f"document_separator={document_separator!r} is for text files, not source={str(source)!r}; leave it out."
        )
    if source == PYTHON_DOCS:
        return _from_python_docs(split, cache_dir)
    assert isinstance(source, str | PathLike)  # a list is one of files, which are read by now
    return _from_dataset(source, split, text_column, config_name, cache_dir)


# --- text files ------------------------------------------------------------------------------------------------------


def _text_files(source: Source, split: str) -> list[Path]:
    """The text files that `source` stands for; none if it is a dataset.

    Raises FileNotFoundError for a missing file, ValueError for an empty list, a folder without text, or a wrong split.
    """
    if isinstance(source, str | PathLike):
        folder = Path(source).expanduser()
        if folder.is_dir():
            return [] if _is_saved_dataset(folder) else _files_of_split(folder, split)
        if _may_name_a_dataset(source):
            return []
        source = [source]
    paths = [Path(path).expanduser() for path in source]
    if not paths:
        raise ValueError("source=[] names no file; give at least one.")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"source={str(path)!r} does not exist or is not a file; check the path.")
    if split != "train":
        raise ValueError(
            f"split={split!r} is not in files given by name, they are 'train'; give the files of that split."
        )
    return paths


def _may_name_a_dataset(source: str | PathLike) -> bool:
    """Whether this can be `name` or `owner/name` on the Hub, rather than a file, there or missing."""
    like_a_name = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None
    return like_a_name and not Path(source).is_file() and not _is_text_file(Path(source))


def _is_text_file(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(TEXT_SUFFIXES)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The text files below `folder` whose path names `split`; all of them, as "train", if no path names any split."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_text_file(path))
    if not files:
        raise ValueError(f"source={str(folder)!r} holds no text files ({', '.join(TEXT_SUFFIXES)}, also with .gz).")
    by_split: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in files:
        name = _split_in_name(path.relative_to(folder))
        (unnamed if name is None else by_split.setdefault(name, [])).append(path)
    if unnamed and by_split:
        raise ValueError(
            f"source={str(folder)!r} holds files named for the splits {sorted(by_split)}, and others, as "
            f"{unnamed[0].name!r}; give the list of files instead."
        )
    by_split = by_split or {"train": unnamed}
    if split not in by_split:
        raise ValueError(f"split={split!r} is not in source={str(folder)!r}, which has {sorted(by_split)}.")
    return by_split[split]


def _split_in_name(path: Path) -> str | None:
    """The split that a word of the path names."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split, names in WORDS_FOR_SPLITS.items() if words.intersection(names)), None)


def _from_text_files(files: Sequence[Path], split: str, document_separator: str, cache_dir: str | None) -> Dataset:
    """Stream text files into a table. It is made anew when the size or the time of a file changes."""
    stamps = tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    arguments = {"stamps": stamps, "document_separator": document_separator, "version": READER_VERSION}
    features = Features({"text": Value("string"), "ends_document": Value("bool")})
    return generate_table(_rows_of_text_files, arguments, features, split, cache_dir)


def _rows_of_text_files(stamps: tuple[tuple[str, int, int], ...], document_separator: str, version: int):
    """`read_text_files` with all that identifies its result.

    Raises ValueError if there is no document, which `datasets` could not make a table of.
    """
    files = [Path(path) for path, _, _ in stamps]
    is_empty = True
    for row in read_text_files(files, document_separator):
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"source={[str(path) for path in files]} holds no text; give a corpus that is not empty.")


def generate_table(rows: Callable, arguments: dict, features: Features, split: str, cache_dir: str | None) -> Dataset:
    """The table of what `rows(**arguments)` yields, from the cache if the same was made before."""
    try:
        return Dataset.from_generator(
            rows, features=features, gen_kwargs=arguments, split=NamedSplit(split), cache_dir=cache_dir
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # raised by `rows`, and hidden by a sentence that says nothing
            raise error.__cause__ from None
        raise


# --- the Python reference --------------------------------------------------------------------------------------------


def _from_python_docs(split: str, cache_dir: str | None) -> Dataset:
    """Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not in source={PYTHON_DOCS!r}, which has {list(SPLITS)}.")
    arguments = {"split": split, "python": platform.python_version(), "version": READER_VERSION}
    return generate_table(_rows_of_python_docs, arguments, Features({"text": Value("string")}), split, cache_dir)


def _rows_of_python_docs(split: str, python: str, version: int):
    """`read_python_docs` with all that identifies its result."""
    return read_python_docs(split)


# --- datasets --------------------------------------------------------------------------------------------------------


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _from_dataset(
    source: str | PathLike, split: str, text_column: str, config_name: str | None, cache_dir: str | None
) -> Dataset:
    """One column of a saved or named dataset, under the name "text".

    Raises as `load_documents` does.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        dataset = _saved_split(folder, split)
    else:
        try:
            dataset = load_dataset(str(source), config_name, split=split, cache_dir=cache_dir)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"source={str(source)!r} is no file, no folder and no dataset that can be loaded: {error}"
            ) from error
    if len(dataset) == 0:
        raise ValueError(f"source={str(source)!r} has no rows in split={split!r}; give a corpus that is not empty.")
    if text_column not in dataset.column_names:
        raise ValueError(
            f"text_column={text_column!r} is not in source={str(source)!r}: it has {dataset.column_names}."
        )
    feature = dataset.features[text_column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise TypeError(
            f"text_column={text_column!r} of source={str(source)!r} holds {feature}; name one that holds text."
        )
    if dataset.data.column(text_column).null_count:
        raise ValueError(
            f"text_column={text_column!r} of source={str(source)!r} has rows without text; filter them out."
        )
    dataset = dataset.select_columns(text_column)
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def _saved_split(folder: Path, split: str) -> Dataset:
    """The table of `split` in a folder that `save_to_disk` wrote. A table without a split is "train"."""
    saved = load_from_disk(str(folder))
    splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"split={split!r} is not in source={str(folder)!r}, which has {sorted(splits)}.")
    return splits[split]
