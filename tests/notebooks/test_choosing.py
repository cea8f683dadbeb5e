"""What the notebook on choosing says of the stored results is what the results say."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import hf_efficient

ROOT = Path(__file__).parents[2]
CELLS = [
    cell
    for cell in json.loads((ROOT / "notebooks" / "choosing.ipynb").read_text("utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
PRINTED = "".join("".join(output.get("text", "")) for cell in CELLS for output in cell["outputs"])
REPORT = (ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8")


def numbers(pattern, text=PRINTED):
    """The numbers that a pattern's groups catch in a text."""
    return [float(number.replace(",", "")) for number in re.search(pattern, text).groups()]


def rows_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def test_crossing_in_time_is_that_of_the_report():
    pattern = r"faster (?:than the Llama )?from about ([\d,]+) tokens"
    assert numbers(pattern) == numbers(pattern, REPORT)


def test_crossing_in_memory_lies_between_the_lengths_where_the_order_turns():
    (found,) = numbers(r"in less memory from about ([\d,]+) on")
    for row in rows_of("reformer_vs_sdpa"):
        assert (row["ours_mb"] < row["peer_mb"]) == (row["config"]["length"] > found)


def test_price_of_halting_is_that_of_the_report():
    found = re.findall(r"time is ([\d.]+) to ([\d.]+) times n / N", REPORT)
    low, high = min(float(low) for low, _ in found), max(float(high) for _, high in found)
    assert numbers(r"halting takes ([\d.]+) to ([\d.]+) times") == [low, high]
    assert numbers(r"take less than (\d+)% of the deepest") == [round(100 / high)]


def test_prices_of_the_memory_and_of_the_evolved_transformer():
    (row,) = rows_of("ptb_memory")
    assert numbers(r"\(3\) a training step takes ([\d.]+) times") == [round(row["ours_s"] / row["peer_s"], 2)]
    low, high = numbers(r"([\d.]+) to ([\d.]+) times the decoding")
    ratios = [1 / row["ratio"] for row in rows_of("et_decode") if row["config"]["peer"].startswith("Marian")]
    assert abs(low - min(ratios)) < 0.01
    assert abs(high - max(ratios)) < 0.01
    (lead,) = numbers(r"\(5\) ([\d.]+) BLEU more")
    scores = {
        name: numbers(rf"\| {name}.*? \| +[\d,]+ \| [^|]* \| +([\d.]+)", REPORT)[0]
        for name in ("Evolved Transformer, 1", "Transformer with LayerNorm")
    }
    assert abs(lead - scores["Evolved Transformer, 1"] + scores["Transformer with LayerNorm"]) < 0.06


def test_text_says_what_the_live_figures_say():
    """The sentences below them: hashing buys time, reversibility costs some, a window in a cache is as fast."""
    for name in ("windowed_lsh", "windowed_lsh, not reversible"):
        short, _, _, long = numbers(rf"(?m)^{name} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d,]+$")
        assert short < 1 < long
    assert max(numbers(r"full, reversible +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +never")) < 1
    milliseconds = {
        name: float(re.search(rf"^{re.escape(name)}.* ([\d.]+) ms, +[\d.]+ MB$", PRINTED, re.MULTILINE)[1])
        for name in ("everything kept (Llama)", "window kept (Mistral)", "Transformer-XL")
    }
    assert milliseconds["everything kept (Llama)"] > 2 * milliseconds["window kept (Mistral)"]
    assert 0.7 < milliseconds["Transformer-XL"] / milliseconds["window kept (Mistral)"] < 1.4
    learned = {
        name: numbers(rf"{name} +[\d,]+ weights, perplexity +(\d+) after +(\d+) s")
        for name in ("Llama", "LSTM", "Transformer-XL", "Universal Transformer, 3 steps")
    }
    assert sorted(learned, key=lambda name: learned[name][0])[:2] == ["LSTM", "Transformer-XL"]
    assert min(learned, key=lambda name: learned[name][1]) == "LSTM"


@pytest.fixture
def first_cell(monkeypatch):
    """The names that the notebook's first cell defines."""
    for name in ("IPython", "IPython.display"):  # Jupyter need not be there
        module = types.ModuleType(name)
        module.version_info, module.Image = (9, 0), None
        monkeypatch.setitem(sys.modules, name, module)
    names, num_threads = {}, torch.get_num_threads()
    exec("".join(CELLS[0]["source"]), names)
    torch.set_num_threads(num_threads)
    return names


def test_results_are_looked_for_around_the_notebook_then_around_the_package(first_cell, tmp_path, monkeypatch):
    results_folder = first_cell["results_folder"]
    monkeypatch.chdir(ROOT / "notebooks")
    assert results_folder() == ROOT / "benchmarks" / "results"
    monkeypatch.chdir(tmp_path)
    assert results_folder() == Path(hf_efficient.__file__).parents[1] / "benchmarks" / "results"
    monkeypatch.setattr(hf_efficient, "__file__", str(tmp_path / "hf_efficient" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="run this notebook in a clone"):
        results_folder()


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([0.5, 2.0, 4.0], 200), ([2.0, 0.5, 2.0], 600), ([2.0, 3.0, 4.0], 100), ([2.0, 3.0, 0.5], None)],
)
def test_crossing_is_read_between_the_logarithms(first_cell, ratios, expected):
    found = first_cell["crossing"]([100, 400, 900], ratios)
    assert found == expected if expected is None else round(found) == expected
