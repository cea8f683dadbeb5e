"""Every kind of source, the cache, and what bad sources get."""

import random
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_efficient.data import load_documents, segment_lanes, tokenize_documents, train_tokenizer
from hf_efficient.data.text_files import PIECE_CHARACTERS


def write(folder: Path, **texts: str) -> Path:
    """Write files, `a__b_txt` for a/b.txt, and return the folder."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# --- text files ------------------------------------------------------------------------------------------------------


def test_a_file_is_one_document_however_long(tmp_path):
    text = "some words\n" * PIECE_CHARACTERS
    path = write(tmp_path, a_txt=text) / "a.txt"
    documents = load_documents(path, cache_dir=tmp_path / "cache")
    assert documents.column_names == ["text", "ends_document"]
    assert "".join(documents["text"]) == text
    assert list(documents["ends_document"]) == [False] * (len(documents) - 1) + [True]


def test_several_files_keep_the_callers_order(tmp_path):
    write(tmp_path, a_txt="A", b_txt="B")
    documents = load_documents([str(tmp_path / "b.txt"), tmp_path / "a.txt"], cache_dir=tmp_path / "cache")
    assert list(documents["text"]) == ["B", "A"]


def test_separators_reach_the_files(tmp_path):
    path = write(tmp_path, a_txt="one\n\ntwo\nthree\n") / "a.txt"
    lines = load_documents(path, document_separator="line", cache_dir=tmp_path / "cache")
    paragraphs = load_documents(path, document_separator="blank_line", cache_dir=tmp_path / "cache")
    assert list(lines["text"]) == ["one", "two", "three"]
    assert list(paragraphs["text"]) == ["one\n", "two\nthree\n"]


def test_folder_without_names_of_splits_is_read_whole_and_sorted(tmp_path):
    folder = write(tmp_path / "books", b_txt="B", a_md="A", c__a_txt="C", notes_pdf="no text")
    assert list(load_documents(folder, cache_dir=tmp_path / "cache")["text"]) == ["A", "B", "C"]


@pytest.mark.parametrize(
    "names",
    [("wiki_train_tokens", "wiki_valid_tokens", "wiki_test_tokens"), ("train__a_txt", "dev__a_txt", "test__a_txt")],
)
def test_folder_with_names_of_splits(tmp_path, names):
    folder = write(tmp_path / "corpus", **dict(zip(names, ("T", "V", "E"), strict=True)))
    for split, text in {"train": "T", "validation": "V", "test": "E"}.items():
        documents = load_documents(folder, split=split, cache_dir=tmp_path / "cache")
        assert list(documents["text"]) == [text]
        assert str(documents.split) == split


def test_table_lies_on_disk_and_is_made_once(tmp_path):
    path = write(tmp_path, a_txt="first") / "a.txt"
    first = load_documents(path, cache_dir=tmp_path / "cache")
    [file] = [Path(entry["filename"]) for entry in first.cache_files]
    assert tmp_path / "cache" in file.parents
    written = file.stat().st_mtime_ns
    again = load_documents(path, cache_dir=tmp_path / "cache")
    assert again.cache_files == first.cache_files
    assert file.stat().st_mtime_ns == written


def test_table_is_made_anew_when_the_file_changes(tmp_path):
    path = write(tmp_path, a_txt="first") / "a.txt"
    load_documents(path, cache_dir=tmp_path / "cache")
    path.write_text("second")
    assert list(load_documents(path, cache_dir=tmp_path / "cache")["text"]) == ["second"]


# --- the Python reference --------------------------------------------------------------------------------------------


def test_python_docs_splits_share_no_text(tmp_path):
    splits = {
        name: load_documents("python-docs", name, cache_dir=tmp_path) for name in ("train", "validation", "test")
    }
    paragraphs = {
        name: {" ".join(part.split()) for text in split["text"] for part in text.split("\n\n") if len(part) > 100}
        for name, split in splits.items()
    }
    size = {name: sum(map(len, split["text"])) for name, split in splits.items()}
    for name in ("validation", "test"):
        common = paragraphs["train"] & paragraphs[name]
        assert sum(map(len, common)) < 0.02 * size[name]
        assert 0.05 < size[name] / sum(size.values()) < 0.15
        assert len(splits[name]) >= 4
    assert size["train"] > 250_000


def test_python_docs_are_topics_in_order(python_docs):
    names = {text: name for name, text in topics.items()}
    found = [names[text] for text in python_docs["text"]]
    assert found == sorted(found)
    assert "compound" in found
    assert "try" not in found  # a section of "compound"


# --- datasets --------------------------------------------------------------------------------------------------------


def test_saved_dataset(tmp_path):
    Dataset.from_dict({"id": [1, 2], "body": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    documents = load_documents(tmp_path / "saved", text_column="body")
    assert documents.column_names == ["text"]
    assert list(documents["text"]) == ["one", "two"]


def test_saved_dataset_dict_has_its_splits(tmp_path):
    parts = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert list(load_documents(str(tmp_path / "saved"), "validation")["text"]) == ["validation"]
    with pytest.raises(ValueError, match=r"split='test' is not in .*, which has \['train', 'validation'\]"):
        load_documents(tmp_path / "saved", "test")


def test_dataset_by_name(monkeypatch, tmp_path):
    def fake_load_dataset(path, name, *, split, cache_dir):
        assert (path, name, split, cache_dir) == ("owner/corpus", "raw", "train[:10%]", str(tmp_path))
        return Dataset.from_dict({"content": ["one"], "id": [0]})

    monkeypatch.setattr("hf_efficient.data.documents.load_dataset", fake_load_dataset)
    documents = load_documents("owner/corpus", "train[:10%]", "content", config_name="raw", cache_dir=tmp_path)
    assert documents.to_dict() == {"text": ["one"]}


# --- what bad input gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "../a/b/c", "/missing/file", "missing.txt.gz"])
def test_missing_file(source):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(Path(source)))) + ".* check the path"):
        load_documents(source)


def test_missing_file_among_several(tmp_path):
    write(tmp_path, a_txt="A")
    with pytest.raises(FileNotFoundError, match=r"b\.txt' does not exist"):
        load_documents([tmp_path / "a.txt", tmp_path / "b.txt"])


@pytest.mark.parametrize("source", ["no-such-dataset", "owner/no-such-dataset"])
def test_missing_dataset(source):
    with pytest.raises(FileNotFoundError, match=f"source='{source}' is no file, no folder and no dataset"):
        load_documents(source)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, {}, "holds no text files"),
        ({"a_txt": ""}, {}, "holds no text; give a corpus that is not empty"),
        ({"a_txt": "\n \n"}, {"document_separator": "line"}, "holds no text"),
        ({"a_txt": "A"}, {"split": "validation"}, r"split='validation' is not in .*, which has \['train'\]"),
        ({"train_txt": "A", "b_txt": "B"}, {}, r"splits \['train'\], and others, as 'b.txt'; give the list of files"),
        ({"a_txt": "A"}, {"document_separator": "page"}, "document_separator='page' is none of 'file', 'line'"),
    ],
)
def test_bad_folders(tmp_path, files, arguments, message):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder, **files)
    with pytest.raises(ValueError, match=message):
        load_documents(folder, cache_dir=tmp_path / "cache", **arguments)


def test_bad_files(tmp_path):
    write(tmp_path, a_txt="A", empty_txt="")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for source, arguments, message in [
        ([], {}, r"source=\[\] names no file"),
        (tmp_path / "a.txt", {"split": "test"}, "split='test' is not in files given by name"),
        (tmp_path / "empty.txt", {}, r"empty.txt'\] holds no text"),
        (tmp_path / "latin.txt", {}, "latin.txt is not UTF-8 text: .* at byte 3"),
        ("python-docs", {"split": "dev"}, r"split='dev' is not in source='python-docs', which has \['train'"),
        ("python-docs", {"document_separator": "line"}, "document_separator='line' is for text files"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_documents(source, cache_dir=tmp_path / "cache", **arguments)


def test_bad_columns(tmp_path):
    Dataset.from_dict({"id": [1, 2], "body": ["one", None]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"text_column='text' is not in .*: it has \['id', 'body'\]"):
        load_documents(tmp_path / "saved")
    with pytest.raises(TypeError, match="text_column='id' .*; name one that holds text"):
        load_documents(tmp_path / "saved", text_column="id")
    with pytest.raises(ValueError, match="text_column='body' .* has rows without text; filter them out"):
        load_documents(tmp_path / "saved", text_column="body")
    with pytest.raises(ValueError, match="split='test' is not in"):
        load_documents(tmp_path / "saved", "test")


def test_dataset_without_rows(monkeypatch):
    empty = Dataset.from_dict({"text": []})
    monkeypatch.setattr("hf_efficient.data.documents.load_dataset", lambda *args, **kwargs: empty)
    with pytest.raises(ValueError, match="source='owner/corpus' has no rows in split='train'"):
        load_documents("owner/corpus")


# --- manners ---------------------------------------------------------------------------------------------------------


def test_no_global_generator_is_touched(tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    path = write(tmp_path, a_txt="some text to read " * 100) / "a.txt"
    documents = load_documents(path, cache_dir=tmp_path / "cache")
    tokens = tokenize_documents(documents, train_tokenizer(documents, "bpe", 300))
    segment_lanes(tokens, 2, 8)[3]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
