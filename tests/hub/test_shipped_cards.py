"""The cards in model_cards/: every figure in them is one that a run has recorded."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from docs_pages import commands
from huggingface_hub import ModelCard

from hf_efficient.cli.arguments import CommandParser

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "model_cards"
sys.path.extend(map(str, (FOLDER, ROOT / "benchmarks")))

import experiments  # noqa: E402 (found on the path just extended)
import make_cards  # noqa: E402
from reproductions import runner  # noqa: E402

CARDS = sorted(path.stem for path in FOLDER.glob("*.md") if path.name != "README.md")
RECORDED = sorted(path.stem for path in make_cards.RECORDS.glob("*.json"))
REPRODUCTIONS = ROOT / "benchmarks" / "results" / "reproductions"


@pytest.fixture(scope="module")
def rendered():
    return make_cards.render()


def test_every_card_has_a_record_and_every_finished_table_a_card():
    tables = [f"reproduction_{path.stem}" for path in REPRODUCTIONS.glob("*.json")]
    assert sorted([*RECORDED, *tables]) == CARDS


@pytest.mark.parametrize("name", CARDS)
def test_card_is_what_the_record_makes(rendered, name):
    """Letter by letter: nobody writes into a card by hand."""
    hint = "python model_cards/make_cards.py writes it anew"
    assert (FOLDER / f"{name}.md").read_text("utf-8") == rendered[name], hint


def results_of(name):
    return ModelCard.load(FOLDER / f"{name}.md").data.eval_results


def record_of(name):
    return json.loads((make_cards.RECORDS / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", [name for name in RECORDED if "output" not in record_of(name)])
def test_model_index_of_a_run(name):
    """Read from the record without the program that made the card."""
    validation = record_of(name)["validation"]
    figures = {result.metric_type: result.metric_value for result in results_of(name)}
    assert "perplexity" in figures
    assert figures == {kind: pytest.approx(validation[kind], abs=1e-4) for kind in figures}


@pytest.mark.parametrize("name", [name for name in RECORDED if "output" in record_of(name)])
def test_model_index_of_a_script(name):
    words = re.split(r"[\s:,%]+", record_of(name)["output"])
    assert all(f"{result.metric_value:.2f}" in words for result in results_of(name))


def numbers_in(content):
    """Every number in a JSON value."""
    if isinstance(content, dict | list):
        values = content.values() if isinstance(content, dict) else content
        return {number for value in values for number in numbers_in(value)}
    is_number = isinstance(content, int | float) and not isinstance(content, bool)
    return {round(float(content), 4)} if is_number else set()


@pytest.mark.parametrize("name", [name for name in CARDS if name.startswith("reproduction_")])
def test_model_index_of_a_table(name):
    """Each figure is a number of the table's file; where a row has several seeds, the mean of two such numbers."""
    rows = json.loads((REPRODUCTIONS / f"{name.removeprefix('reproduction_')}.json").read_text("utf-8"))
    by_row = {}
    for row in rows:
        by_row.setdefault(row["row"], []).append(numbers_in(row["results"]))
    results = results_of(name)
    for result in results:
        owner = max((row for row in by_row if result.metric_name.endswith(f", {row}")), key=len)
        first, *others = by_row[owner]
        if not others:
            assert result.metric_value in first, result.metric_name
        else:
            means = {round((one + other) / 2, 4) for one in first for other in others[0]}
            assert result.metric_value in means, result.metric_name
    assert {row for row in by_row if any(result.metric_name.endswith(f", {row}") for result in results)} == set(by_row)


COMMANDS = [(name, words) for name in CARDS for words in commands(FOLDER / f"{name}.md")]


@pytest.mark.parametrize(
    ("name", "words"), COMMANDS, ids=[f"{name}-{' '.join(words)[:40]}" for name, words in COMMANDS]
)
def test_command_that_repeats_the_run_is_understood(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, command, *arguments = words
    if program == "hf-efficient":
        CommandParser(import_module(f"hf_efficient.cli.{command}").COMMAND.for_arguments(arguments)).read(arguments)
    else:
        assert program == "python"
        assert Path(command).is_file()
        if command == "benchmarks/reproduce.py":
            assert f"reproduction_{runner.parse(arguments).tables[0]}" == name


def test_every_card_has_its_command():
    assert {name for name, _ in COMMANDS} == set(CARDS)


def test_figures_printed_by_a_script():
    metrics = [{"type": "accuracy", "name": "Accuracy", "pattern": r"test: ([\d.]+)%"}]
    assert list(experiments.printed("training: 9%\ntest: 12.5%\n", metrics)) == [("accuracy", "Accuracy", 12.5)]
    with pytest.raises(ValueError, match="finds nothing"):
        list(experiments.printed("nothing", metrics))


def test_notes_go_to_the_end_of_their_sections():
    card = "# a\n\nHead.\n\n## Results\n\nGood.\n\n## Limits\n\n- One.\n"
    notes = make_cards.Notes({}, "More head.", {"Results": "Very.", "The text": "Old.", "Limits": "- Two."})
    assert make_cards.add_notes(card, notes) == (
        "# a\n\nHead.\n\nMore head.\n\n## Results\n\nGood.\n\nVery.\n\n"
        "## The text\n\nOld.\n\n## Limits\n\n- One.\n- Two.\n"
    )


def test_commands_name_the_rows_where_a_seed_has_not_all(monkeypatch):
    monkeypatch.setattr(experiments, "read_settings", lambda table: {"a": {}, "b": {}})
    rows = [{"row": "a", "seed": 0}, {"row": "b", "seed": 0}, {"row": "b", "seed": 1}]
    assert list(experiments.reproduction_commands("t", rows)) == [
        "python benchmarks/reproduce.py --data data --tables t --seeds 0",
        'python benchmarks/reproduce.py --data data --tables t --seeds 1 --rows "b"',
    ]
