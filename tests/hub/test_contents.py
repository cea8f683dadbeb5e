"""Which files of a folder go to the Hub, and the folders that are refused before anything is sent."""

import json
import pickle
import subprocess

import pytest
from hub.published_models import QUICK_ROWS, save_published

from hf_efficient.hub import collect_contents
from hf_efficient.hub.ignore_rules import IGNORE_FILES, ignore_rules
from hf_efficient.hub.model_card import PAPERS
from hf_efficient.hub.remote_code import architecture_classes
from hf_efficient.models.reformer import MODELS, ReformerConfig
from hf_efficient.models.transformer_xl import TransformerXLTokenizer


def edit(path, old, new):
    """Replace words in a text file that has them."""
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


# --- files ------------------------------------------------------------------------------------------------------

PARTS = ["chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE", "merges.txt", "vocab.json", "spiece.model"]


@pytest.mark.parametrize("name", [*PARTS, "special_tokens_map.json", "added_tokens.json"])
def test_parts_of_a_model(folder, name):
    (folder / name).write_text("{}")
    assert name in collect_contents(folder, with_code=False).files


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".env", "hidden"),
        ("optimizer.pt", "record of the training"),
        ("rng_state_1.pth", "record of the training"),
        ("training_args.bin", "record of the training"),
        ("checkpoint-10/", "checkpoint of the training"),
        ("data/", "folder"),
        ("notes.txt", "no part of a model"),
        ("more.safetensors", "no part of a model"),
        ("modeling_mine.py", "code"),
        ("unshown.png", "no part of a model"),
    ],
)
def test_reason_to_stay(folder, name, reason):
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_text("x")
    contents = collect_contents(folder, with_code=False)
    assert contents.left_out == {"report.json": "record of the training", name: reason}


def test_pictures_in_folders_go_if_the_card_shows_them(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "shown.png").write_bytes(b"shown")
    (folder / "pictures" / "other.png").write_bytes(b"other")
    edit(
        folder / "README.md", "(loss.png)", '(./pictures/shown%2Epng?raw=true "a title")\n<img width=3 src="loss.png">'
    )
    files = collect_contents(folder, with_code=False).files
    assert [name for name in files if name.endswith(".png")] == ["loss.png", "pictures/shown.png"]


def test_pictures_that_are_no_files_here(folder):
    elsewhere = "](https://example.org/loss.png) ![](data:image/png;base64,AAAA)\n```markdown\n![](example.png)\n```\n"
    edit(folder / "README.md", "](loss.png)", elsewhere)
    assert not any(name.endswith(".png") for name in collect_contents(folder, with_code=False).files)


def test_folder_of_links_as_in_a_cache(folder, tmp_path):
    """huggingface_hub's cache holds links to files that lie elsewhere, under other names."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for number, path in enumerate(folder.iterdir()):
        (tmp_path / f"blob{number}").write_bytes(path.read_bytes())
        (cache / path.name).symlink_to(tmp_path / f"blob{number}")
    here, there = (collect_contents(place, with_code=True).files for place in (folder, cache))
    assert {name: upload.read() for name, upload in here.items()} == {
        name: upload.read() for name, upload in there.items()
    }


def test_rules_are_read_as_git_reads_them(tmp_path):
    """Git itself is asked, for every pair of a rule file and a path."""
    rules = [
        *(
            "*.png",
            "!keep.png",
            "/top.txt",
            "deep/*.json",
            "folder/",
            "# comment",
            "",
            "a?c",
            "[xy].bin",
            "trailing  ",
        ),
        *("name", "!name/inner", "all/**/of.it", "all/**", "*.log", "!important.log", "/folder2/file"),
    ]
    paths = [
        *("a.png", "keep.png", "sub/a.png", "sub/keep.png", "top.txt", "sub/top.txt", "deep/a.json", "deep/b/a.json"),
        *("folder/a", "sub/folder/a", "folder", "abc", "ac", "x.bin", "z.bin", "trailing", "name", "sub/name"),
        *("un/of.it", "un/a/b/of.it", "every/a/b", "score", "bcore", "#a", "b*", "bc"),
        *("name/inner", "some.log", "important.log", "folder2/file", "sub/folder2/file", "# comment"),
    ]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("\n".join(rules))
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    asked = subprocess.run(command, cwd=tmp_path, input="\n".join(paths), capture_output=True, text=True, check=False)
    ours = ignore_rules(tmp_path)

    def ignored(path):
        last = next((rule for rule in reversed(ours) if rule.matches(path)), None)
        return last is not None and not last.keeps

    # "name/inner" is kept in vain: git does not look into a folder that is excluded.
    assert [path for path in paths if ignored(path) and path != "name/inner"] == [
        path for path in asked.stdout.splitlines() if path != "name/inner"
    ]


def test_pattern_that_is_none(folder):
    (folder / ".hubignore").write_text("[z-a].png\n")
    with pytest.raises(ValueError, match=r"\.hubignore, line 1 has the pattern .*mend it"):
        collect_contents(folder, with_code=False)


@pytest.mark.parametrize("rules", IGNORE_FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_rules_that_exclude_what_a_model_needs(folder, rules, name):
    (folder / rules).write_text(f"\n{name}\n")
    with pytest.raises(ValueError, match=rf"{name} is excluded by {rules}, line 2.*take that rule away"):
        collect_contents(folder, with_code=False)


@pytest.mark.parametrize("exclude", ["3", "{a: b}", "[1]"])
def test_rules_of_the_card_that_are_none(folder, exclude):
    edit(folder / "README.md", "license:", f"exclude: {exclude}\nlicense:")
    with pytest.raises(ValueError, match="exclude.*write a list of patterns"):
        collect_contents(folder, with_code=False)


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "vocab.pkl"])
def test_pickles_are_refused(folder, name):
    (folder / name).write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=rf"'{name}', a pickle.*save_pretrained"):
        collect_contents(folder, with_code=False)
    (folder / ".hubignore").write_text(f"{name}\n")
    assert name not in collect_contents(folder, with_code=False).files
    (folder / "model.safetensors").unlink()
    (folder / ".hubignore").unlink()
    with pytest.raises(ValueError, match=rf"'{name}', a pickle.*save_pretrained"):
        collect_contents(folder, with_code=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "whole"), (b"\x80\x02}q\x00.", "whole"), (None, "whole"), (b"\x02" + bytes(7) + b"{}", "holds no weights")],
)
def test_broken_weights(folder, content, words):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=f"model.safetensors.*{words}.*again"):
        collect_contents(folder, with_code=False)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ({"weight_map": {"w": "model-00001-of-00001.safetensors"}}, FileNotFoundError, "which is missing"),
        ({"weight_map": {"w": "../model.safetensors"}}, ValueError, "no safetensors file beside it"),
        ({"weight_map": {"w": "model-1.bin"}}, ValueError, "no safetensors file beside it"),
        ({}, ValueError, "no index of weights"),
        ([], ValueError, "no index of weights"),
    ],
)
def test_broken_index(folder, index, error, words):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=words):
        collect_contents(folder, with_code=False)


def test_index_beside_whole_weights_stays(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json" in collect_contents(folder, with_code=False).left_out


# --- folders that are refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_missing_parts(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no .*{name}.*(give|save|write)"):
        collect_contents(folder, with_code=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoint-20/config.json", "give one of its checkpoints, such as .*checkpoint-20"),
        ("adapter_config.json", "it is an adapter, .*merge_and_unload"),
    ],
)
def test_folder_with_something_else_than_a_model(tmp_path, name, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"holds no config.json; {words}"):
        collect_contents(tmp_path, with_code=False)


def test_missing_tokenizer_is_mentioned(folder):
    assert not any("tokenizer" in hint for hint in collect_contents(folder, with_code=False).hints)
    (folder / "tokenizer_config.json").unlink()
    assert any("no tokenizer" in hint for hint in collect_contents(folder, with_code=False).hints)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        collect_contents(tmp_path / "absent", with_code=False)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_broken_configuration(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json .*JSON"):
        collect_contents(folder, with_code=False)


SECRETS = [
    "hf_" + "aB3" * 12,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3" * 12,
    "AKIA" + "A1B2" * 4,
    "sk-" + "aB3-" * 12,
    "-----BEGIN OPENSSH PRIVATE KEY-----",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "chat_template.jinja"])
def test_secrets_are_not_published(folder, secret, name):
    path = folder / name
    path.write_text((path.read_text("utf-8") if path.exists() else "") + f"\n\n{secret}\n")
    line = path.read_text("utf-8").count("\n")
    with pytest.raises(ValueError, match=f"{name}, line {line}, holds what looks like") as caught:
        collect_contents(folder, with_code=False)
    assert secret not in str(caught.value)


def test_vocabulary_in_another_encoding(folder):
    (folder / "vocab.txt").write_bytes("Ünïcödé".encode("latin-1"))
    assert "vocab.txt" in collect_contents(folder, with_code=False).files


# --- code -------------------------------------------------------------------------------------------------------


def test_code_of_another_s_model(folder):
    edit(folder / "config.json", '"transfo-xl"', '"llama"')
    with pytest.raises(ValueError, match="model_type='llama'; known are .*Publish without code"):
        collect_contents(folder, with_code=True)
    collect_contents(folder, with_code=False)


def test_code_that_lies_in_the_folder_does_not_go(folder):
    """A model saved by remote code, or loaded from such a repository, has files and an auto_map of its own."""
    (folder / "modeling_transformer_xl.py").write_text("CANARY")
    edit(folder / "config.json", "{", '{"auto_map": {"AutoModel": "someone/model--modeling_x.Model"},')
    without = collect_contents(folder, with_code=False)
    assert without.left_out["modeling_transformer_xl.py"] == "code"
    assert "auto_map" not in without.files["config.json"].text()
    assert without.files["config.json"].note == "auto_map removed"
    with_code = collect_contents(folder, with_code=True)
    assert "CANARY" not in with_code.files["modeling_transformer_xl.py"].text()
    assert json.loads(with_code.files["config.json"].text())["auto_map"]["AutoModel"] == (
        "modeling_transformer_xl.TransformerXLModel"
    )


def test_only_auto_map_changes_in_a_configuration(folder):
    before = json.loads((folder / "config.json").read_text())
    after = json.loads(collect_contents(folder, with_code=True).files["config.json"].text())
    auto_map = after.pop("auto_map")
    assert after == before
    assert set(auto_map) == {
        *("AutoConfig", "AutoModel", "AutoModelForCausalLM"),
        *("AutoModelForSequenceClassification", "AutoModelForTokenClassification"),
    }


@pytest.mark.parametrize("class_name", ["TransformerXLTokenizer", "TransfoXLTokenizer"])
def test_tokenizer_with_code_of_its_own(folder, class_name):
    TransformerXLTokenizer(vocab=[f"w{i}" for i in range(17)], splitting="whitespace").save_pretrained(folder)
    edit(folder / "tokenizer_config.json", '"TransformerXLTokenizer"', f'"{class_name}"')
    contents = collect_contents(folder, with_code=True)
    config = json.loads(contents.files["tokenizer_config.json"].text())
    assert config["auto_map"] == {"AutoTokenizer": [f"tokenization_transformer_xl.{class_name}", None]}
    assert {"tokenization_transformer_xl.py", "vocab.json"} <= contents.files.keys()


@pytest.mark.parametrize("architecture", PAPERS)
def test_code_is_complete_and_its_own(architecture, tmp_path):
    """Every sibling that a file imports goes along; no file imports anything else of this package."""
    row = next(row for row in QUICK_ROWS if row.architecture == architecture)
    folder = save_published(row, tmp_path / "model")
    files = collect_contents(folder, with_code=True).files
    code = {name: upload.text() for name, upload in files.items() if name.endswith(".py")}
    assert code
    siblings = {
        line.split()[1].lstrip(".") + ".py"
        for text in code.values()
        for line in text.splitlines()
        if line.startswith("from .")
    }
    assert siblings <= code.keys()
    lines = [line for text in code.values() for line in text.splitlines()[1:]]
    assert not any("hf_efficient" in line for line in lines if not line.lstrip().startswith("#"))


def test_upstream_reformer_left_in_place(monkeypatch):
    """With transformers' own Reformer behind the Auto classes there is none of ours to name."""
    for auto_class in MODELS:
        monkeypatch.delitem(auto_class._model_mapping._extra_content, ReformerConfig)
    with pytest.raises(ValueError, match="unset HF_EFFICIENT_KEEP_UPSTREAM_REFORMER"):
        architecture_classes("reformer")
