"""The word-level tokenizer: vocabulary files, text to words to ids and back, settings, errors."""

import json
import re

import pytest
from transformers import AddedToken, AutoTokenizer, pipeline

from hf_efficient import TransformerXLConfig, TransformerXLForCausalLM
from hf_efficient.models.transformer_xl import tokenization_transformer_xl
from hf_efficient.models.transformer_xl.tokenization_transformer_xl import TransformerXLTokenizer

WORDS = ["<eos>", "<unk>", "the", "cat", "sat", "on", "mat", ".", ",", "@-@", "@,@", "@.@", "1", "5", "000", "half"]


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) if word in WORDS else WORDS.index("<unk>") for word in words]


@pytest.fixture
def tokenizer() -> TransformerXLTokenizer:
    return TransformerXLTokenizer(vocab=WORDS)


# --- text to words to ids and back --------------------------------------------------------------------------


def test_moses_words(tokenizer):
    text = "the cat, half-mat 1,000.5 on  <eos>"
    words = ["the", "cat", ",", "half", "@-@", "mat", "1", "@,@", "000", "@.@", "5", "on", "<eos>"]
    assert tokenizer.tokenize(text) == words
    assert tokenizer(text)["input_ids"] == ids(*words)
    assert tokenizer.decode(ids(*words)) == "the cat, half-mat 1,000.5 on <eos>"
    assert tokenizer.decode(ids(*words), skip_special_tokens=True) == "the cat, half-mat 1,000.5 on"
    assert tokenizer.decode(5) == "on"


def test_whitespace_words():
    tokenizer = TransformerXLTokenizer(vocab=WORDS, splitting="whitespace")
    text = " the cat, half-mat\t1 . <unk>\n"
    assert tokenizer.tokenize(text) == ["the", "cat,", "half-mat", "1", ".", "<unk>"]
    assert tokenizer(text)["input_ids"] == ids("the", "<unk>", "<unk>", "1", ".", "<unk>")
    assert tokenizer.decode(ids("the", "cat", ".")) == "the cat ."


@pytest.mark.parametrize("settings", [{"splitting": "characters"}, {"delimiter": ""}])
def test_characters(settings):
    tokenizer = TransformerXLTokenizer(vocab=["<unk>", "a", "b", " "], eos_token=None, **settings)
    assert tokenizer.splitting == "characters"
    assert tokenizer(" ab ba?")["input_ids"] == [1, 2, 3, 2, 1, 0]


def test_lower_case_leaves_special_tokens():
    tokenizer = TransformerXLTokenizer(vocab=["<UNK>", "cat", "<Sep>", "σασ"], lower_case=True, eos_token=None)
    tokenizer.add_special_tokens({"unk_token": "<UNK>", "sep_token": "<Sep>"})
    assert tokenizer.tokenize("CAT<Sep>Cat ΣΑΣ <UNK>") == ["cat", "<Sep>", "cat", "σασ", "<UNK>"]


def test_never_split(tokenizer):
    kept = TransformerXLTokenizer(vocab=WORDS, never_split=["half-mat"])
    assert kept.tokenize("the half-mat") == ["the", "half-mat"]
    assert tokenizer.tokenize("the half-mat") == ["the", "half", "@-@", "mat"]


def test_batches_are_padded(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<eos>"})
    batch = tokenizer(["the cat sat", "the"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [ids("the", "cat", "sat"), ids("the", "<eos>", "<eos>")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [({}, [], []), ({"add_eos": True}, [], ["<eos>"]), ({"add_double_eos": True}, ["<S>"], ["<S>"])],
)
def test_borders(settings, before, after):
    words = [*WORDS, "<S>"]
    tokenizer = TransformerXLTokenizer(vocab=words, **settings)
    encoding = tokenizer("the cat", return_special_tokens_mask=True)
    expected = [*before, "the", "cat", *after]
    assert tokenizer.convert_ids_to_tokens(encoding["input_ids"]) == expected
    assert encoding["special_tokens_mask"] == [int(word not in ("the", "cat")) for word in expected]
    assert tokenizer("the cat", add_special_tokens=False)["input_ids"] == ids("the", "cat")
    pair = tokenizer("the", "cat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair) == [*before, "the", *after, *before, "cat", *after]


# --- unknown and added words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "unknown_symbol", "expected"),
    [
        (["a", "<unk>", "<UNK>"], None, "<unk>"),
        (["a", "<UNK>"], None, "<UNK>"),
        (["a", "<unk>"], "a", "a"),
    ],
)
def test_unknown_words(words, unknown_symbol, expected):
    tokenizer = TransformerXLTokenizer(vocab=words, unknown_symbol=unknown_symbol, eos_token=None)
    assert tokenizer("b")["input_ids"] == [words.index(expected)]


def test_unknown_word_without_a_symbol_for_it():
    tokenizer = TransformerXLTokenizer(vocab=["a"], unk_token=None, eos_token=None)
    with pytest.raises(ValueError, match="'b' is not in the vocabulary.*unknown_symbol"):
        tokenizer("a b")


def test_special_tokens_that_are_no_words_are_appended():
    tokenizer = TransformerXLTokenizer(vocab=["a", "b"], extra_special_tokens=["<formula>"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["a", "b", "<eos>", "<unk>", "<formula>"]
    assert tokenizer.vocab_size == 2
    assert tokenizer.decode([0, 4, 1, 1]) == "a <formula> b b"


def test_added_tokens_under_ids_of_other_words_are_put_right():
    # transformers 4 saved these ids for a tokenizer that got its vocabulary after it was made.
    added = {0: "<eos>", 1: "<unk>", 2: "<formula>", 3: "<new>", 9: "<nine>"}
    tokenizer = TransformerXLTokenizer(
        vocab=[".", "<unk>", "a", "<eos>", "<formula>"],
        extra_special_tokens=["<formula>"],
        added_tokens_decoder={index: AddedToken(token, special=True) for index, token in added.items()},
    )
    expected = {"<eos>": 3, "<unk>": 1, "<formula>": 4, "<nine>": 9}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert tokenizer.convert_ids_to_tokens(range(5)) == [".", "<unk>", "a", "<eos>", "<formula>"]
    assert "<new>" not in tokenizer.get_vocab()


# --- files --------------------------------------------------------------------------------------------------


def test_saved_tokenizer_is_loaded_with_all_its_settings(tmp_path):
    settings = {"lower_case": True, "splitting": "whitespace", "language": "de", "unknown_symbol": "cat"}
    settings |= {"never_split": ["x"], "add_eos": True, "add_double_eos": False}
    tokenizer = TransformerXLTokenizer(vocab=WORDS, extra_special_tokens=["<formula>"], **settings)
    tokenizer.save_pretrained(tmp_path)
    TransformerXLConfig().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("vocab.json", "tokenizer_config.json", "added_tokens.json", "config.json")
    }
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is TransformerXLTokenizer
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.all_special_tokens == tokenizer.all_special_tokens


def test_tokens_that_a_user_added_are_saved(tokenizer, tmp_path):
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(tmp_path)
    loaded = TransformerXLTokenizer.from_pretrained(tmp_path)
    assert loaded("the newword")["input_ids"] == [*ids("the"), len(WORDS)]


@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json"])
def test_folder_with_a_vocabulary_alone(tmp_path, name):
    TransformerXLConfig().save_pretrained(tmp_path)
    lines = "".join(f"{word} {index * 3}\n" for index, word in enumerate([*WORDS, "the"]))
    content = lines if name == "vocab.txt" else json.dumps({word: index for index, word in enumerate(WORDS)})
    (tmp_path / name).write_text(content, "utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"] == ids("the", "cat")


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "TransfoXLTokenizer"}])
@pytest.mark.parametrize("name", ["vocab.pkl", "vocab.bin"])
def test_pickled_vocabulary_is_not_loaded(tmp_path, settings, name):
    TransformerXLConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / name).write_bytes(b"cos\nabort\n)R.")
    with pytest.raises(ValueError, match=re.escape(f"hf-efficient convert {tmp_path} OUTPUT")):
        AutoTokenizer.from_pretrained(tmp_path)


BROKEN_VOCABULARIES = {
    "vocab.json, no JSON": ("{", "no vocabulary"),
    "vocab.json, empty": ("{}", "holds no words"),
    "vocab.json, a gap": ('{"a": 0, "b": 2}', "id 2 of 'b'"),
    "vocab.json, an id twice": ('{"a": 0, "b": 0}', "id 0 of 'b'"),
    "vocab.json, no number": ('{"a": "0"}', "id '0' of 'a'"),
    "vocab.json, a list of numbers": ("[1, 2]", "no string"),
    "vocab.json, a word twice": ('["a", "a"]', "a word twice"),
    "vocab.txt, an empty line": ("a\n\nb\n", "line 2 is empty"),
    "vocab.txt, empty": ("", "holds no words"),
}


@pytest.mark.parametrize("kind", BROKEN_VOCABULARIES)
def test_broken_vocabulary_files(tmp_path, kind):
    content, reason = BROKEN_VOCABULARIES[kind]
    path = tmp_path / kind.split(",")[0]
    path.write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        TransformerXLTokenizer(str(path))
    assert str(path) in str(caught.value)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"vocab": None}, "There is no vocabulary"),
        ({"splitting": "bytes"}, "splitting='bytes' is unknown; choose one of moses, whitespace, characters"),
        ({"language": "../../secret"}, "language='../../secret' is no language code"),
        ({"add_eos": True, "add_double_eos": True}, "contradict each other"),
        ({"unknown_symbol": "dog"}, "unknown_symbol='dog' is not in the vocabulary"),
    ],
)
def test_illegal_settings(settings, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        TransformerXLTokenizer(**{"vocab": WORDS, **settings})


@pytest.mark.parametrize("index", [-1, len(WORDS)])
def test_id_outside_the_vocabulary(tokenizer, index):
    with pytest.raises(ValueError, match=f"id {index} is outside the vocabulary; ids run from 0 to {len(WORDS) - 1}"):
        tokenizer.convert_ids_to_tokens([index])


def test_without_sacremoses(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization_transformer_xl, "sacremoses", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hf_efficient[legacy]'")):
        tokenizer("the cat")
    spaced = TransformerXLTokenizer(vocab=WORDS, splitting="whitespace")
    assert spaced.decode(spaced("the cat")["input_ids"]) == "the cat"


# --- use ----------------------------------------------------------------------------------------------------


def test_pipeline_generates_text(tmp_path):
    config = TransformerXLConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    TransformerXLForCausalLM(config).save_pretrained(tmp_path)
    TransformerXLTokenizer(vocab=WORDS).save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    generator.tokenizer.pad_token = "<eos>"
    answer = generator("the cat", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert answer.startswith("the cat")
