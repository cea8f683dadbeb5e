"""The five kinds of tokenizers, and the table of tokens against references one can read."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, PythonBackend

from hf_efficient.data import load_documents, load_tokenizer, tokenize_documents, train_tokenizer

KINDS = ("byte", "shifted_byte", "char", "bpe", "shifted_bpe", "word")
CORPUS = ["The cat sat on the mat .\nThe dog <unk> sat too .\n", "Naïve café, 語 🙂!\n", "<eos> <pad> the the the"]
UNSEEN = ["Ж <eos> <pad>\t\n\n  \r\n ends ", "\0\x7f\u200d🙂🏽", "<unk>", ""]


def documents_of(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts)}, features=Features({"text": Value("string")}))


@pytest.fixture(scope="module")
def corpus() -> Dataset:
    return documents_of(*CORPUS)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus, request.param, vocab_size=300 if request.param.endswith("bpe") else None)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_special_tokens_and_inputs(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) in [(0, 1), (1, 0), (256, 257)]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    batch = tokenizer(["The cat", "The"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][1][0] == 0  # generation continues at the right end


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        for text in CORPUS + UNSEEN:
            assert loaded(text).data == tokenizer(text).data
            assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("kind", ["byte", "shifted_byte", "bpe", "shifted_bpe"])
def test_any_text_comes_back_exactly(corpus, kind):
    tokenizer = train_tokenizer(corpus, kind, vocab_size=300 if kind.endswith("bpe") else None)
    rng = random.Random(0)
    anything = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(2000))
    for text in [*CORPUS, *UNSEEN, anything]:
        token_ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(token_ids) == text
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_byte_ids_are_the_bytes(corpus):
    tokenizer = train_tokenizer(corpus, "byte")
    every_byte = bytes(range(0x80)).decode() + "".join(map(chr, range(0x80, 0x800, 7))) + "語🙂\U0010ffff"
    assert tokenizer(every_byte)["input_ids"] == list(every_byte.encode())
    shifted = train_tokenizer(corpus, "shifted_byte")
    assert shifted(every_byte)["input_ids"] == [byte + 2 for byte in every_byte.encode()]
    assert len(tokenizer) == len(shifted) == 258


def test_characters_by_frequency():
    tokenizer = train_tokenizer(documents_of("bbba\n", "ca语"), "char")
    assert tokenizer.get_vocab() == {
        **{"<eos>": 0, "<pad>": 1, "<unk>": 2},
        **{"b": 3, "a": 4, "\n": 5, "c": 6, "语": 7},
    }
    assert tokenizer.decode(tokenizer("abc\n语")["input_ids"]) == "abc\n语"
    assert tokenizer("axxb")["input_ids"] == [4, 2, 2, 3]


def test_words_by_frequency(corpus):
    tokenizer = train_tokenizer(documents_of("b <unk> a\nb", "c c c"), "word")
    assert tokenizer.get_vocab() == {"<eos>": 0, "<pad>": 1, "<unk>": 2, "c": 3, "b": 4, "a": 5}
    assert tokenizer(" a  <unk>\n new c ")["input_ids"] == [5, 2, 2, 3]
    assert tokenizer.decode([5, 2, 3]) == "a <unk> c"


def test_vocab_size_drops_the_rarest(corpus):
    assert train_tokenizer(corpus, "word", 6).get_vocab().keys() >= {"the", "The", "."}
    assert train_tokenizer(corpus, "char", 5).get_vocab().keys() >= {" ", "t"}
    assert len(train_tokenizer(corpus, "bpe", 270)) == 270
    assert len(train_tokenizer(corpus, "byte", 258)) == 258


@pytest.mark.parametrize("kind", KINDS)
def test_lowercase(corpus, kind):
    tokenizer = train_tokenizer(corpus, kind, lowercase=True)
    assert tokenizer("The CAT")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer("THE CAT")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_documents_give_the_same_tokenizer(python_docs, kind):
    vocab_size = 1000 if kind.endswith("bpe") else None
    first, second = (train_tokenizer(python_docs, kind, vocab_size) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bytes", None, "kind='bytes' is none of 'byte', 'shifted_byte', 'char', 'bpe', 'shifted_bpe', 'word'"),
        ("byte", 300, "vocab_size=300 does not fit kind='byte'"),
        ("shifted_byte", 300, "vocab_size=300 does not fit kind='shifted_byte'"),
        ("bpe", 100, "vocab_size=100 is too small; kind='bpe' needs at least 258"),
        ("word", 0, "vocab_size=0 is too small; kind='word' needs at least 4"),
    ],
)
def test_bad_kinds_and_sizes(corpus, kind, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(corpus, kind, vocab_size)


def test_missing_tokenizer(tmp_path):
    for name in (tmp_path, tmp_path / "missing", "no-such-model"):
        with pytest.raises(FileNotFoundError, match=f"path_or_name='{name}' holds no tokenizer"):
            load_tokenizer(name)


# --- tables of tokens ------------------------------------------------------------------------------------------------


def test_each_document_ends_with_eos(tokenizer, corpus):
    tokens = tokenize_documents(corpus, tokenizer)
    bare = tokenize_documents(corpus, tokenizer, add_eos=False)
    assert tokens.column_names == ["input_ids", "num_bytes"]
    assert tokens.features["input_ids"].feature.dtype == "int32"
    for text, row, bare_row in zip(CORPUS, tokens, bare, strict=True):
        assert bare_row["input_ids"] == tokenizer(text)["input_ids"]
        if bare_row["input_ids"][-1:] != [tokenizer.eos_token_id]:
            assert row["input_ids"] == [*bare_row["input_ids"], tokenizer.eos_token_id]
        assert row["num_bytes"] == len(text.encode())


def test_eos_in_place_of_line_ends(tokenizer):
    texts = ["one two\nthree\n", "\n\nno end of line", "", "\n", "one line"]
    eos = tokenizer.eos_token_id

    def reference(text: str, add_eos: bool) -> list[int]:
        token_ids = []
        for line in text.splitlines(keepends=True):
            token_ids += tokenizer(line.removesuffix("\n"))["input_ids"]
            token_ids += [eos] if line.endswith("\n") else []
        return token_ids + ([eos] if add_eos and token_ids[-1:] != [eos] else [])

    for add_eos in (True, False):
        tokens = tokenize_documents(documents_of(*texts), tokenizer, add_eos=add_eos, eos_per_line=True)
        assert list(tokens["input_ids"]) == [reference(text, add_eos) for text in texts]


@pytest.mark.parametrize("eos_per_line", [False, True])
def test_pieces_of_a_document_are_the_document(tokenizer, eos_per_line):
    texts = ["one two\nthree four\n", "five"]
    pieces = {
        "text": ["one", " two\nthree", " four", "\n", "five"],
        "ends_document": [False, False, False, True, True],
    }
    whole = tokenize_documents(documents_of(*texts), tokenizer, eos_per_line=eos_per_line)
    cut = tokenize_documents(Dataset.from_dict(pieces), tokenizer, eos_per_line=eos_per_line)
    assert list(cut["ends_document"]) == pieces["ends_document"]
    assert sum(cut["input_ids"], []) == sum(whole["input_ids"], [])
    assert sum(cut["num_bytes"]) == sum(whole["num_bytes"])


def test_large_batches_are_encoded_in_groups(tokenizer, monkeypatch):
    documents = documents_of(*[f"{'word ' * (number % 7)}{number}\n" for number in range(500)])
    expected = tokenize_documents(documents, tokenizer).to_dict()
    monkeypatch.setattr("hf_efficient.data.tokenization.CHARACTERS_PER_CALL", 50)
    assert tokenize_documents(documents, tokenizer).to_dict() == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # fork, from Python 3.12 on
def test_several_processes_give_the_same_table(python_docs):
    tokenizer = train_tokenizer(python_docs, "word")
    one = tokenize_documents(python_docs, tokenizer)
    two = tokenize_documents(python_docs, tokenizer, num_proc=2)
    assert one.to_dict() == two.to_dict()


class Letters(PythonBackend):
    """A tokenizer without a fast backend."""

    def __init__(self, **kwargs):
        super().__init__(eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 26

    def get_vocab(self) -> dict[str, int]:
        return {chr(ord("a") + index): index for index in range(26)} | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[str]:
        return [letter for letter in text if letter.islower()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - ord("a")

    def _convert_id_to_token(self, index: int) -> str:
        return chr(ord("a") + index)


def test_tokenizer_on_the_python_backend():
    tokens = tokenize_documents(documents_of("ab c\nd", ""), Letters(), eos_per_line=True)
    assert list(tokens["input_ids"]) == [[0, 1, 2, 26, 3, 26], [26]]


def test_tokenizer_that_adds_special_tokens_of_its_own(corpus):
    bare = train_tokenizer(corpus, "word")
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(bare.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 1), ("<eos>", 0)])
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    assert adding("the cat")["input_ids"][0] == 1
    assert tokenize_documents(corpus, adding).to_dict() == tokenize_documents(corpus, bare).to_dict()


def test_bad_documents_and_tokenizers(corpus):
    tokenizer = train_tokenizer(corpus, "byte")
    with pytest.raises(ValueError, match=r"documents must have the column 'text', not \['content'\]"):
        tokenize_documents(corpus.rename_column("text", "content"), tokenizer)
    with pytest.raises(ValueError, match=r"documents must have the column 'text'"):
        train_tokenizer(corpus.rename_column("text", "content"), "char")
    without_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="tokenizer has no eos token; set tokenizer.eos_token, or add_eos=False"):
        tokenize_documents(corpus, without_eos)
    assert len(tokenize_documents(corpus, without_eos, add_eos=False)) == len(corpus)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_table_lies_beside_the_documents_and_depends_on_all_arguments(python_docs):
    tokenizer = train_tokenizer(python_docs, "byte")
    tables = [
        tokenize_documents(python_docs, tokenizer),
        tokenize_documents(python_docs, tokenizer, add_eos=False),
        tokenize_documents(python_docs, tokenizer, eos_per_line=True),
        tokenize_documents(python_docs, train_tokenizer(python_docs, "byte", lowercase=True)),
    ]
    files = [Path(table.cache_files[0]["filename"]) for table in tables]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files} == {Path(python_docs.cache_files[0]["filename"]).parent}


PIPELINE = """
import sys
from hf_efficient.data import load_documents, load_tokenizer, tokenize_documents
documents = load_documents(sys.argv[1], cache_dir=sys.argv[2])
print(tokenize_documents(documents, load_tokenizer(sys.argv[3])).cache_files[0]["filename"])
"""


def test_another_process_uses_the_table_again(tmp_path, corpus):
    (tmp_path / "a.txt").write_text("\n".join(CORPUS))
    documents = load_documents(tmp_path / "a.txt", cache_dir=tmp_path / "cache")
    train_tokenizer(corpus, "word").save_pretrained(tmp_path / "tokenizer")
    tokens = tokenize_documents(documents, load_tokenizer(tmp_path / "tokenizer"))
    file = Path(tokens.cache_files[0]["filename"])
    written = file.stat().st_mtime_ns
    arguments = [tmp_path / "a.txt", tmp_path / "cache", tmp_path / "tokenizer"]
    result = subprocess.run(
        [sys.executable, "-c", PIPELINE, *map(str, arguments)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(file)
    assert file.stat().st_mtime_ns == written
