"""Cards that the Hub, or a reader, would stumble over are found before anything is sent."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_efficient.hub.card_checks import card_hints, read_card, shown_pictures

SHIPPED = sorted(path for path in (Path(__file__).parents[2] / "model_cards").glob("*.md") if path.name != "README.md")
GOOD = """\
license: mit
language: [en, "no"]
library_name: transformers
pipeline_tag: text-generation
datasets: Salesforce/wikitext
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: a, type: a}
    metrics: [{type: perplexity, value: 12.5}]
"""


def card_in(folder, metadata, text="# mine\n"):
    folder.joinpath("README.md").write_text(f"---\n{metadata}---\n{text}", encoding="utf-8")
    return folder


def test_good_card(tmp_path):
    card = read_card(card_in(tmp_path, GOOD))
    assert card.data.eval_results[0].metric_value == 12.5
    assert card_hints(card) == ()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("license: mit\n", "", "no license in its metadata; add such as `license: apache-2.0`"),
        ("license: mit", "license: ''", "license: ''.*write a word"),
        ("license: mit", "license: [mit]", r"license: \['mit'\].*write a word"),
        ("library_name: transformers\n", "", "no library_name"),
        ("pipeline_tag: text-generation\n", "", "no pipeline_tag"),
        ('"no"', "no", "language: False.*in quotes"),
        ("datasets: Salesforce/wikitext", "datasets: 103", "datasets: 103.*write a word"),
        ("value: 12.5", "value: .nan", "perplexity: nan.*measured number"),
        ("value: 12.5", "value: .inf", "perplexity: inf.*measured number"),
        ("value: 12.5", "value: good", "perplexity: 'good'.*measured number"),
        ("metrics: [{type: perplexity, value: 12.5}]", "metrics: [{type: perplexity}]", "invalid metadata"),
        ("dataset: {name: a, type: a}", "", "invalid metadata"),
        ("license: mit", "license: [", "invalid metadata"),
        (GOOD, "- a\n- b\n", "invalid metadata"),
        (GOOD, "", "no license and no library_name and no pipeline_tag in its metadata"),
        (GOOD, "tags: [generated_from_trainer]\n", "no license .*write_trainer_card"),
    ],
)
def test_bad_metadata(tmp_path, old, new, words):
    assert old in GOOD
    with pytest.raises(ValueError, match=f"README.md .*{words}"):
        read_card(card_in(tmp_path, GOOD.replace(old, new) or "\n"))


def test_card_without_metadata(tmp_path):
    (tmp_path / "README.md").write_text("# mine\n\n---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="begins with no metadata"):
        read_card(tmp_path)


def test_card_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    with pytest.raises(ValueError, match="README.md has invalid metadata.*utf-8"):
        read_card(tmp_path)


def test_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no card, README.md; write one"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        ("absent.png", FileNotFoundError, "missing"),
        ("../outside.png", ValueError, "from outside the folder"),
        ("a/../../outside.png", ValueError, "from outside the folder"),
        ("/etc/passwd", ValueError, "from outside the folder"),
    ],
)
def test_pictures_that_would_not_be_seen(tmp_path, picture, error, words):
    (tmp_path / "outside.png").touch()
    (tmp_path / "model").mkdir()
    folder = card_in(tmp_path / "model", GOOD, f"![A curve]({picture})\n")
    with pytest.raises(error, match=words):
        shown_pictures(read_card(folder), folder)


def test_hints(tmp_path):
    metadata = "license: unknown\nlibrary_name: transformers\npipeline_tag: text-generation\n"
    command = "hf-efficient train --text /home/me/books --output_dir /Users/you/run\n"
    hints = "\n".join(card_hints(read_card(card_in(tmp_path, metadata, command))))
    for words in ("license: unknown", "no language", "no measured results", "/home/me names", "/Users/you names"):
        assert words in hints
    assert "/home/me/books" not in hints


@pytest.mark.parametrize("words", ["More information needed", "[](https://huggingface.co/)"])
def test_blanks_of_templates(tmp_path, words):
    (hint,) = card_hints(read_card(card_in(tmp_path, GOOD, f"It is {words}\n")))
    assert words in hint


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_cards_are_fit_for_the_hub(path, tmp_path):
    (tmp_path / "README.md").write_text(path.read_text("utf-8"), encoding="utf-8")
    card = read_card(tmp_path)
    assert card_hints(card) == ()
    assert isinstance(card, ModelCard)
    assert all(name.startswith(path.stem) for name in shown_pictures(card, path.parent))
